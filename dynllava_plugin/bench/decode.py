"""Decoding with a KV cache, bound by the bytes of weights, keys and values: time per step at several lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.bench.modes import Mode
from dynllava_plugin.bench.run import Run, against_full, held_bytes, kept_share, kind, spaced
from dynllava_plugin.bench.subject import Prompts
from dynllava_plugin.bench.timing import interleaved, release, summary
from dynllava_plugin.flops import decode_step_flops, decode_step_weights
from dynllava_plugin.policies.base import OUTPUT
from dynllava_plugin.sparsity.cache import SparseContextCache

WINDOW = 8  # steps timed together


@dataclass
class _Stream:
    """A mode that decodes its batch in one way."""

    mode: Mode
    path: str
    prompts: Prompts
    cache: SparseContextCache
    at: int = 0  # answer tokens fed

    def window(self) -> None:
        for _ in range(WINDOW):
            self.prompts.step(self.cache, self.at)
            self.at += 1

    def advance(self, run: Run, length: int) -> None:
        run.subject.switch(self.mode)
        self.prompts.feed(self.cache, self.at, length)
        self.at = max(self.at, length)


def steps_measured(run: Run) -> int:
    """Decode steps that measuring one length takes."""
    return WINDOW * (run.repeats + run.warmup)


@torch.inference_mode()
def decode(run: Run) -> None:
    """Steps of every mode and path, in turns, after each number of generated tokens."""
    lengths = spaced(run.lengths, steps_measured(run))
    for batch in run.batches:
        wanted = [length for length in lengths if not _has(run, batch, length)]
        if not wanted:
            continue
        prompts = run.subject.prompts(batch, lengths[-1] + steps_measured(run))
        prompts.calibrate()
        streams = {
            (mode.name, path): _start(run, prompts, mode, path)
            for path in run.paths
            for mode in run.modes_on(path)
        }
        for length in wanted:
            for stream in streams.values():
                stream.advance(run, length)
            calls = {key: stream.window for key, stream in streams.items()}
            times = interleaved(
                calls, run.device, run.repeats, run.warmup, before=lambda key: run.switch(key[0])
            )
            _add(run, batch, length, streams, times)
        del streams, prompts
        release(run.device)


@torch.inference_mode()
def batching(run: Run) -> None:
    """Tokens a second of a batch of mixed prompt lengths against a batch of one, in one interleaved run."""
    largest, length = max(run.batches), min(run.lengths)
    if largest == 1 or run.rows.has(
        {"phase": "batching", "mode": mode.name, "batch": batch}
        for mode in run.modes_on(run.paths[0])
        for batch in (1, largest)
    ):
        return
    for mode in run.modes_on(run.paths[0]):
        batches = {
            batch: run.subject.prompts(batch, length + steps_measured(run), mixed=batch > 1)
            for batch in (1, largest)
        }
        batches[largest].calibrate()  # both are timed under one predictor
        streams = {}
        for batch, prompts in batches.items():
            streams[batch] = _start(run, prompts, mode, run.paths[0])
            streams[batch].advance(run, length)
        calls = {batch: stream.window for batch, stream in streams.items()}
        times = interleaved(calls, run.device, run.repeats, run.warmup)
        single = summary(times[1])["median_s"]
        for batch, stream in streams.items():
            measured = _per_step(times[batch])
            run.add(
                phase="batching", mode=mode.name, path=stream.path, prompts=kind(stream.prompts), batch=batch,
                length=length, **measured, tokens_per_s=batch / measured["median_s"],
                speedup=batch * single / (measured["median_s"] * WINDOW),
            )  # fmt: skip


def _has(run: Run, batch: int, length: int) -> bool:
    return all(
        run.has("decode", run.modes_on(path), path=path, batch=batch, length=length) for path in run.paths
    )


def _start(run: Run, prompts: Prompts, mode: Mode, path: str) -> _Stream:
    run.subject.switch(mode)
    cache = run.new_cache(path)
    prompts.prefill(cache)
    return _Stream(mode, path, prompts, cache)


def _per_step(times: list[float]) -> dict[str, float]:
    return summary([time / WINDOW for time in times])


def _add(
    run: Run,
    batch: int,
    length: int,
    streams: dict[tuple[str, str], _Stream],
    times: dict[tuple[str, str], list[float]],
) -> None:
    subject = run.subject
    shape, full_weights = subject.shape, decode_step_weights(subject.shape, text_predictor=False)
    for (name, path), stream in streams.items():
        held = held_bytes(stream.cache, subject)
        asks = OUTPUT in subject.policy(stream.mode).predictors
        read = decode_step_weights(shape, asks) * subject.itemsize + held["needed_bytes"]
        full_held = held_bytes(streams["full", path].cache, subject)["needed_bytes"]
        measured = _per_step(times[name, path])
        full = _per_step(times["full", path])["median_s"]
        run.add(
            phase="decode", mode=name, path=path, prompts=kind(stream.prompts), batch=batch, length=length,
            **measured, tokens_per_s=batch / measured["median_s"],
            **against_full(full, measured["median_s"], full_weights * subject.itemsize + full_held, read),
            tflops_exact=decode_step_flops(shape, subject.context(stream.mode), length, batch) / 1e12,
            read_bytes=read, kept_share=kept_share(stream.cache), **held,
        )  # fmt: skip
