"""Whole passes over the LLM: prefill, and decoding without a cache. Both are bound by arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dynllava_plugin.bench.run import Run, against_full
from dynllava_plugin.bench.subject import Prompts
from dynllava_plugin.bench.timing import interleaved, release, summary
from dynllava_plugin.flops import paper_prefill_flops, prefill_flops, uncached_step_flops


@torch.inference_mode()
def prefill(run: Run) -> None:
    """Prefill into a fresh cache, logits of the last token, per batch size."""
    for batch in run.batches:
        if run.has("prefill", batch=batch):
            continue
        prompts = run.subject.prompts(batch, 1)
        calls = {mode.name: partial(_prefill, run, prompts) for mode in run.modes}
        times = interleaved(calls, run.device, run.repeats, run.warmup, run.switch)
        _add(run, "prefill", batch, 0, times)
        release(run.device)


@torch.inference_mode()
def nocache(run: Run) -> None:
    """One step without cache (the whole context again) after each number of generated tokens."""
    for batch in run.batches:
        prompts = run.subject.prompts(batch, max(run.lengths))
        if max(run.lengths):
            prompts.calibrate()
        for length in run.lengths:
            if run.has("nocache", run.parallel_modes, batch=batch, length=length):
                continue
            calls = {mode.name: partial(_uncached, run, prompts, length) for mode in run.parallel_modes}
            times = interleaved(calls, run.device, max(run.repeats // 2, 2), run.warmup, run.switch)
            _add(run, "nocache", batch, length, times)
        release(run.device)


def _prefill(run: Run, prompts: Prompts) -> Any:
    return prompts.prefill(run.new_cache("eager"))


def _uncached(run: Run, prompts: Prompts, length: int) -> Any:
    ids = torch.cat([prompts.ids, prompts.answers[:, :length]], 1)
    return run.subject.model(
        ids,
        attention_mask=prompts.mask_with(length) if prompts.mixed else None,
        mm_encoder_outputs=prompts.encoded,
        **prompts.more,
        use_cache=False,
        logits_to_keep=1,
        prompt_length=prompts.width,
    )


def _add(run: Run, phase: str, batch: int, length: int, times: dict[str, list[float]]) -> None:
    shape = run.subject.shape
    exact = prefill_flops if phase == "prefill" else partial(uncached_step_flops, generated=length)
    modes = [mode for mode in run.modes if mode.name in times]
    costs = {mode.name: exact(shape, run.subject.context(mode), batch=batch) for mode in modes}
    full = summary(times["full"])["median_s"]
    for mode in modes:
        context = run.subject.context(mode)
        measured = summary(times[mode.name])
        run.add(
            phase=phase,
            mode=mode.name,
            path="eager",
            prompts="equal",
            batch=batch,
            length=length,
            **measured,
            **against_full(full, measured["median_s"], costs["full"], costs[mode.name]),
            tflops_paper=paper_prefill_flops(shape, context, batch) / 1e12,
            tflops_exact=costs[mode.name] / 1e12,
        )
