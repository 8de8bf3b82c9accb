"""Memory: what the cache allocates and, on a GPU, the allocator's peak above the weights. One mode at a time."""

from __future__ import annotations

from typing import Any

import torch

from dynllava_plugin.bench.modes import Mode
from dynllava_plugin.bench.run import Run, held_bytes, kept_share, spaced
from dynllava_plugin.bench.subject import Prompts, estimated_bytes
from dynllava_plugin.bench.timing import release
from dynllava_plugin.environment import free_bytes
from dynllava_plugin.flops import cache_bytes
from dynllava_plugin.sparsity.tracks import GROWTH_STEP

STEPS = GROWTH_STEP + 8  # so that a buffer grows while the peak is watched


@torch.inference_mode()
def memory(run: Run) -> None:
    """Every mode and batch size through prefill and decoding; what can't fit is a row, too."""
    lengths = spaced(run.lengths, STEPS)
    for batch in run.batches:
        if all(run.has("memory", batch=batch, length=length) for length in lengths):
            continue
        prompts = run.subject.prompts(batch, lengths[-1] + STEPS)
        prompts.calibrate()
        for mode in run.modes:
            release(run.device)
            _one_mode(run, prompts, mode, lengths)


def _one_mode(run: Run, prompts: Prompts, mode: Mode, lengths: list[int]) -> None:
    subject, batch = run.subject, prompts.batch
    subject.switch(mode)
    context = subject.context(mode)
    cache, fed, fits = run.new_cache("eager"), 0, True
    prefill_peak = 0
    for length in lengths:
        needed = estimated_bytes(subject.shape, [context], batch, length + STEPS, subject.itemsize)[1]
        fits = fits and needed < free_bytes(run.device) + cache.num_bytes()
        about: dict[str, Any] = dict(
            phase="memory", mode=mode.name, path="eager", prompts="equal", batch=batch, length=length
        )
        try:
            if fits and not fed:
                _reset(run)
                prompts.prefill(cache)
                prefill_peak = _peak(run)
            if fits:
                prompts.feed(cache, fed, length)
                release(run.device)
                _reset(run)
                steps = STEPS if run.device.type == "cuda" else 1
                for column in range(length, length + steps):
                    prompts.step(cache, column)
                fed = length + steps
        except torch.OutOfMemoryError:
            fits = False
        if not fits:
            nominal = cache_bytes(subject.shape, context, length, subject.itemsize, batch)
            run.add(**about, fits=False, needed_bytes=int(nominal), weight_bytes=subject.weight_bytes)
            continue
        peak = max(prefill_peak, _peak(run)) - subject.weight_bytes
        run.add(
            **about, fits=True, **held_bytes(cache, subject), kept_share=kept_share(cache),
            peak_bytes=peak if run.device.type == "cuda" else None, weight_bytes=subject.weight_bytes,
        )  # fmt: skip


def _reset(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)


def _peak(run: Run) -> int:
    return torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else 0
