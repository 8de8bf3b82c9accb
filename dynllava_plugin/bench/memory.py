"""Memory: what the cache allocates and, on a GPU, the allocator's peak above the weights. One mode at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dynllava_plugin.bench.run import Run, held, spaced
from dynllava_plugin.bench.subject import Prompts, working_bytes
from dynllava_plugin.bench.timing import peak_allocated, release
from dynllava_plugin.environment import free_bytes
from dynllava_plugin.flops import cache_bytes
from dynllava_plugin.sparsity.tracks import GROWTH_STEP

STEPS = GROWTH_STEP + 8  # so that a buffer grows while the peak is watched


@torch.inference_mode()
def memory(run: Run) -> None:
    """Bring every mode and batch size through prefill and decoding; what can't fit is a row, too."""
    lengths = spaced(run.lengths, STEPS)
    for batch in run.batches:
        modes = [
            mode for mode in run.modes
            if not all(run.has("memory", [mode], batch=batch, length=length) for length in lengths)
        ]  # fmt: skip
        if not modes:
            continue
        prompts = run.subject.prompts(batch, lengths[-1] + STEPS)
        prompts.calibrate()
        for mode in modes:
            release(run.subject.device)
            _one_mode(run, prompts, mode, lengths)


def _one_mode(run: Run, prompts: Prompts, mode: str, lengths: list[int]) -> None:
    subject, batch, on_gpu = run.subject, prompts.batch, run.subject.device.type == "cuda"
    subject.switch(mode)
    context, weights = subject.context(mode), subject.weight_bytes
    cache, fed, fits, highest = run.new_cache("eager"), 0, True, 0

    def decode(first: int, steps: int) -> None:
        for column in range(first, first + steps):
            prompts.step(cache, column)

    for length in lengths:
        needed = working_bytes(subject.shape, [context], batch, length + STEPS, subject.itemsize)
        fits = fits and needed < free_bytes(subject.device) + cache.num_bytes()
        found = {"fits": fits, "weight_bytes": weights}
        steps = STEPS if on_gpu else 1
        try:
            if fits and not fed:
                highest = _peak(run, lambda: prompts.prefill(cache))
            if fits:
                prompts.feed(cache, fed, length)
                release(subject.device)
                peak = max(highest, _peak(run, lambda: decode(length, steps))) - weights  # noqa: B023
                fed = length + steps
                found |= {**held(cache, subject), "peak_bytes": peak if on_gpu else None}
        except torch.OutOfMemoryError:
            found["fits"] = fits = False
        if not fits:
            found["needed_bytes"] = int(cache_bytes(subject.shape, context, length, subject.itemsize, batch))
        run.rows.add(
            phase="memory", mode=mode, path="eager", prompts="equal", batch=batch, length=length, **found
        )


def _peak(run: Run, work: Callable[[], Any]) -> int:
    if run.subject.device.type == "cuda":
        return peak_allocated(work, run.subject.device)
    work()
    return 0
