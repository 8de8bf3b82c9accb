"""What a policy costs, measured: prefill time and cache bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dynllava_plugin.bench.timing import seconds, summary
from dynllava_plugin.compare.subjects import Subject
from dynllava_plugin.evaluation.engine.engine import Engine


@torch.inference_mode()
def prefill_times(
    engine: Engine, subjects: Sequence[Subject], inputs: Sequence[dict[str, Any]], repeats: int
) -> dict[Subject, dict[str, float]]:
    """Milliseconds from pixels and prompt to the first logits, one sample at a time, policies taking turns.

    Parameters
    ----------
    engine : Engine
    subjects : sequence of Subject
    inputs : sequence of dict
        `model(...)` arguments of single samples.
    repeats : int
        Turns, after one that doesn't count.

    Returns
    -------
    For each subject ``prefill_ms`` (median over samples and turns), ``prefill_iqr_ms``.
    """
    model = engine.model
    base = model.config.sparsity
    times: dict[Subject, list[float]] = {subject: [] for subject in subjects}
    order = list(subjects)
    try:
        for sample in inputs:
            for turn in range(repeats + 1):
                # Each goes first in its turn: what the one before leaves in the caches is nobody's lasting advantage.
                for subject in order[turn % len(order) :] + order[: turn % len(order)]:
                    model.config.text_config.sparsity = subject.settings(base)
                    taken = seconds(partial(model, **sample, use_cache=True, logits_to_keep=1), model.device)
                    if turn:
                        times[subject].append(taken)
    finally:
        model.config.text_config.sparsity = base
    found = {}
    for subject, measured in times.items():
        facts = summary(measured)
        found[subject] = {"prefill_ms": 1e3 * facts["median_s"], "prefill_iqr_ms": 1e3 * facts["iqr_s"]}
    return found


@torch.inference_mode()
def cache_bytes(model: Any, inputs: dict[str, Any], answer: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean bytes of keys and values (and marks that rank them) held for a sample after its whole answer.

    Parameters
    ----------
    inputs : dict
        `model(...)` arguments of B prompts.
    answer, mask : int64 [B, T]
        Answer tokens, right padded, and 1 where they are real.
    """
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    attended = inputs["attention_mask"]
    for step in range(answer.shape[1]):
        attended = torch.cat([attended, mask[:, step : step + 1]], 1)
        out = model(
            answer[:, step : step + 1],
            attention_mask=attended,
            past_key_values=out.past_key_values,
            logits_to_keep=1,
        )
    cache = out.past_key_values
    return float(sum(_held_bytes(layer) for layer in cache.layers)) / len(answer)


def _held_bytes(layer: Any) -> float:
    """Of a cache layer, the bytes of the slots that are in use."""
    tensors = [layer.keys, layer.values, getattr(layer, "received", None), getattr(layer, "number", None)]
    used = float(layer.track.lengths.sum())  # over samples
    total = 0.0
    for tensor in tensors:
        if tensor is not None:
            slots = tensor.shape[0] * tensor.shape[2]
            total += used * tensor.numel() * tensor.element_size() / slots
    return total
