"""Decoding with a KV cache, bound by the bytes of weights, keys and values: time per step at several lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dynllava_plugin.bench.run import Run, against_full, held, kind, spaced
from dynllava_plugin.bench.subject import Prompts
from dynllava_plugin.bench.timing import release, summary
from dynllava_plugin.flops import decode_step_flops, decode_step_weights
from dynllava_plugin.sparsity.cache import SparseContextCache

WINDOW = 8  # steps timed together


@dataclass
class _Stream:
    """A mode that decodes its batch in one way; `at` answer tokens have been fed."""

    mode: str
    path: str
    prompts: Prompts
    cache: SparseContextCache
    at: int = 0

    @classmethod
    def start(cls, run: Run, prompts: Prompts, mode: str, path: str) -> _Stream:
        """Return the stream behind its prefill."""
        run.subject.switch(mode)
        cache = run.new_cache(path)
        prompts.prefill(cache)
        return cls(mode, path, prompts, cache)

    def window(self) -> None:
        """Take the steps that are timed together."""
        for _ in range(WINDOW):
            self.prompts.step(self.cache, self.at)
            self.at += 1

    def advance(self, run: Run, length: int) -> None:
        """Feed answer tokens up to `length`."""
        run.subject.switch(self.mode)
        self.prompts.feed(self.cache, self.at, length)
        self.at = max(self.at, length)


def steps_measured(run: Any) -> int:
    """Return how many decode steps it takes to measure one length, in so many `repeats` and `warmup` turns."""
    return WINDOW * (run.repeats + run.warmup)


@torch.inference_mode()
def decode(run: Run) -> None:
    """Time steps of every mode and path, in turns, after each number of generated tokens."""
    lengths = spaced(run.lengths, steps_measured(run))
    for batch in run.batches:
        wanted = [
            length for length in lengths
            if not all(run.has("decode", run.modes_on(path), path=path, batch=batch, length=length) for path in run.paths)
        ]  # fmt: skip
        if not wanted:
            continue
        prompts = run.subject.prompts(batch, lengths[-1] + steps_measured(run))
        prompts.calibrate()
        pairs = [(mode, path) for path in run.paths for mode in run.modes_on(path)]
        streams = {(mode, path): _Stream.start(run, prompts, mode, path) for mode, path in pairs}
        for length in wanted:
            for stream in streams.values():
                stream.advance(run, length)
            calls = {key: stream.window for key, stream in streams.items()}
            times = run.times(calls, run.repeats, before=lambda key: run.subject.switch(key[0]))
            _add(run, batch, length, streams, {key: _per_step(taken) for key, taken in times.items()})
        del streams, prompts
        release(run.subject.device)


@torch.inference_mode()
def batching(run: Run) -> None:
    """Time a batch of mixed prompt lengths and a batch of one in turns, and add their tokens a second."""
    sizes, length, path = (1, max(run.batches)), min(run.lengths), run.paths[0]
    if sizes[1] == 1 or all(run.has("batching", run.modes_on(path), batch=batch) for batch in sizes):
        return
    for mode in run.modes_on(path):
        prompts = [
            run.subject.prompts(batch, length + steps_measured(run), mixed=batch > 1) for batch in sizes
        ]
        prompts[1].calibrate()  # both are timed under one predictor
        streams = {each.batch: _Stream.start(run, each, mode, path) for each in prompts}
        for stream in streams.values():
            stream.advance(run, length)
        times = run.times({batch: stream.window for batch, stream in streams.items()}, run.repeats)
        single = _per_step(times[1])["median_s"]
        for batch, stream in streams.items():
            measured = _per_step(times[batch])
            run.rows.add(
                phase="batching", mode=mode, path=path, prompts=kind(stream.prompts), batch=batch, length=length,
                **measured, tokens_per_s=batch / measured["median_s"], speedup=batch * single / measured["median_s"],
            )  # fmt: skip


def _per_step(times: list[float]) -> dict[str, float]:
    return summary([time / WINDOW for time in times])


def _add(
    run: Run,
    batch: int,
    length: int,
    streams: dict[tuple[str, str], _Stream],
    times: dict[tuple[str, str], dict[str, float]],
) -> None:
    subject, shape = run.subject, run.subject.shape
    caches = {key: held(stream.cache, subject) for key, stream in streams.items()}
    contexts = {mode: subject.context(mode) for mode in run.modes}

    def read_bytes(name: str, path: str) -> int:
        weights = decode_step_weights(shape, contexts[name].text_predictor) * subject.itemsize
        return weights + caches[name, path]["needed_bytes"]

    for (name, path), measured in times.items():
        median, full = measured["median_s"], times["full", path]["median_s"]
        read = read_bytes(name, path)
        run.rows.add(
            phase="decode", mode=name, path=path, prompts=kind(streams[name, path].prompts), batch=batch, length=length,
            **measured, tokens_per_s=batch / median, **against_full(full, median, read_bytes("full", path), read),
            tflops_exact=decode_step_flops(shape, contexts[name], length, batch) / 1e12,
            read_bytes=read, **caches[name, path],
        )  # fmt: skip
