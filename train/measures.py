"""What a line of the log says about the steps since the last: loss terms, keep rates, speed, memory, time left."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.selection import last_answer

GIB = 2**30
OFF_TARGET = 0.1  # a keep rate so far from its target is told


class Measures:
    """Sums over micro-batches; nothing waits for the device until `take`.

    Parameters
    ----------
    sparsity : SparsityConfig
        Answers shorter than its `min_text_length` don't count towards the text keep rate, nor questions below
        `min_prompt_length` towards theirs.
    """

    def __init__(self, sparsity: SparsityConfig) -> None:
        self.sparsity = sparsity
        self._sums: dict[str, torch.Tensor] = {}
        self._since, self._step = time.monotonic(), 0

    def start(self, step: int) -> None:
        """Start the clock at this optimiser step."""
        self._since, self._step = time.monotonic(), step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for a while: saving and evaluating are not training."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - begin

    @torch.no_grad()
    def add(
        self,
        outputs: Any,
        samples: torch.Tensor,
        image_tokens: torch.Tensor,
        labels: torch.Tensor,
        tokens: torch.Tensor,
        lm_loss: tuple[torch.Tensor, torch.Tensor],
        question: torch.Tensor | None = None,
    ) -> None:
        """Add a micro-batch.

        Parameters
        ----------
        outputs : DynamicLlavaOutput
            The model's.
        samples : int64 [B]
        image_tokens : bool [B, L]
        labels : int64 [B, L]
        tokens : int64 scalar
            Tokens that are no padding.
        lm_loss : (scalar, scalar)
            The cross entropy summed over what it is a mean of, and how many those are.
        question : bool [B, L], optional
            Text of the last question, where it may be dropped.
        """
        number = torch.tensor(float(len(samples)), device=labels.device)
        parts = {
            "lm_loss": lm_loss[0],
            "lm_weight": lm_loss[1],
            "samples": number,
            "tokens": tokens,
        }
        if outputs.image_keep is not None:
            parts["image_keep_loss"] = outputs.image_keep_loss * number
            parts |= _rates("image_keep_rate", outputs.image_keep, image_tokens.sum(1), minimum=1)
        if outputs.text_keep is not None:
            parts["text_keep_loss"] = outputs.text_keep_loss * number
            answers = last_answer(labels).sum(1)
            parts |= _rates(
                "text_keep_rate", outputs.text_keep, answers, max(self.sparsity.min_text_length, 1)
            )
        if outputs.prompt_keep is not None and question is not None:
            parts["prompt_keep_loss"] = outputs.prompt_keep_loss * number
            shortest = max(self.sparsity.min_prompt_length, 1)
            parts |= _rates("prompt_keep_rate", outputs.prompt_keep, question.sum(1), shortest)
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + part.double()

    def take(self, accelerator: Any, step: int, max_steps: int) -> dict[str, float]:
        """Return the means since the last call, over all processes; empty where nothing was added."""
        if not self._sums:
            return {}
        names = list(self._sums)
        values = accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum")
        sums = dict(zip(names, values.tolist(), strict=True))
        self._sums = {}
        logs = {"lm_loss": sums["lm_loss"] / max(sums["lm_weight"], 1)}
        for name in ("image_keep_loss", "text_keep_loss", "prompt_keep_loss"):
            if name in sums:
                logs[name] = sums[name] / sums["samples"]
        for name in ("image_keep_rate", "text_keep_rate", "prompt_keep_rate"):
            if count := sums.get(f"{name} count"):
                mean = sums[name] / count
                logs[name] = mean
                logs[f"{name}_std"] = max(sums[f"{name} squares"] / count - mean**2, 0.0) ** 0.5
        now = time.monotonic()
        seconds, steps = max(now - self._since, 1e-9), step - self._step
        logs["samples_per_second"] = sums["samples"] / seconds
        logs["tokens_per_second"] = sums["tokens"] / seconds
        logs["peak_memory_gib"] = peak_memory(accelerator)
        if steps > 0:
            logs["hours_left"] = (max_steps - step) * seconds / steps / 3600
        self._since, self._step = now, step
        return logs


def off_target(history: Sequence[dict[str, float]], sparsity: SparsityConfig) -> str:
    """Return one line that names the predictors whose last logged keep rate is over 0.1 from what they were trained for, or "".

    Several gates, and keep rates drawn per sample, have no one target.
    """
    targets = {"text_keep_rate": sparsity.text_keep_rate, "prompt_keep_rate": sparsity.prompt_keep_rate}
    if not sparsity.vision_keep_range and len(sparsity.image_gates) == 1:
        targets["image_keep_rate"] = sparsity.image_gates[0][1]
    last = {name: [row[name] for row in history if name in row][-1:] for name in targets}
    off = [
        f"{name} is {rate:.2f}, not {targets[name]:g}"
        for name, rates in last.items()
        for rate in rates
        if abs(rate - targets[name]) > OFF_TARGET
    ]
    if not off:
        return ""
    return f"warning: {'; '.join(off)} at the last step: train longer, raise --keep_loss_weight, or clip (--max_grad_norm 1)"


def peak_memory(accelerator: Any) -> float:
    """GiB that the process with the most has held: of the GPU's memory, or on the CPU resident memory."""
    if torch.cuda.is_available() and accelerator.device.type == "cuda":
        held = torch.cuda.max_memory_allocated() / GIB
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return float(accelerator.gather(torch.tensor([held], device=accelerator.device)).max())


def count_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return how many predicted tokens [B, L] labels ask for."""
    return (labels[:, 1:] != -100).sum()


def _rates(name: str, keep: torch.Tensor, totals: torch.Tensor, minimum: int) -> dict[str, torch.Tensor]:
    """Sum, sum of squares and number of samples' keep rates, where a sample has at least `minimum` tokens."""
    counted = totals >= minimum
    rate = (keep.sum(1) / totals.clamp(min=1)) * counted
    return {name: rate.sum(), f"{name} squares": rate.square().sum(), f"{name} count": counted.sum()}
