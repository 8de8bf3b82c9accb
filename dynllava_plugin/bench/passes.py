"""Whole passes over the LLM: prefill, and decoding without a cache. Both are bound by arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dynllava_plugin.bench.run import Run, against_full
from dynllava_plugin.bench.subject import Prompts
from dynllava_plugin.bench.timing import release, summary
from dynllava_plugin.flops import paper_prefill_flops, prefill_flops, uncached_step_flops


@torch.inference_mode()
def prefill(run: Run) -> None:
    """Time prefill into a fresh cache, logits of the last token, per batch size: in every mode on every path, in turns."""
    for batch in run.batches:
        if all(run.has("prefill", run.modes_on(path), path=path, batch=batch) for path in run.paths):
            continue
        prompts = run.subject.prompts(batch, 1)
        pairs = [(mode, path) for path in run.paths for mode in run.modes_on(path)]
        calls = {(mode, path): partial(_prefill, run, prompts, path) for mode, path in pairs}
        _add(run, "prefill", batch, 0, run.times(calls, run.repeats, lambda key: run.subject.switch(key[0])))
        release(run.subject.device)


@torch.inference_mode()
def nocache(run: Run) -> None:
    """Time one step without cache (the whole context again) after each number of generated tokens."""
    for batch in run.batches:
        modes = run.parallel_modes
        wanted = [
            length for length in run.lengths if not run.has("nocache", modes, batch=batch, length=length)
        ]
        if not wanted:
            continue
        prompts = run.subject.prompts(batch, max(run.lengths))
        if max(run.lengths):
            prompts.calibrate()
        for length in wanted:
            calls = {(mode, "eager"): partial(_uncached, prompts, length) for mode in modes}
            times = run.times(calls, max(run.repeats // 2, 2), lambda key: run.subject.switch(key[0]))
            _add(run, "nocache", batch, length, times)
        release(run.subject.device)


def _prefill(run: Run, prompts: Prompts, path: str) -> Any:
    return prompts.prefill(run.new_cache(path))


def _uncached(prompts: Prompts, length: int) -> Any:
    return prompts.subject.model(
        **prompts.inputs(length), use_cache=False, logits_to_keep=1, prompt_length=prompts.width
    )


def _add(run: Run, phase: str, batch: int, length: int, times: dict[tuple[str, str], list[float]]) -> None:
    subject, shape = run.subject, run.subject.shape
    for (mode, path), taken in times.items():
        measured, full = summary(taken), summary(times["full", path])["median_s"]
        full_cost, cost = (
            prefill_flops(shape, context, batch)
            if phase == "prefill"
            else uncached_step_flops(shape, context, length, batch)
            for context in (subject.context(run.modes[0]), subject.context(mode))
        )
        run.rows.add(
            phase=phase, mode=mode, path=path, prompts="equal", batch=batch, length=length, **measured,
            **against_full(full, measured["median_s"], full_cost, cost),
            tflops_paper=paper_prefill_flops(shape, subject.context(mode), batch) / 1e12, tflops_exact=cost / 1e12,
        )  # fmt: skip
