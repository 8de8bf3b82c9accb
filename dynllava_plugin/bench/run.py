"""What every phase shares: the subject, the modes, the rows, and the ratio to full context."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from dynllava_plugin.bench.modes import Mode
from dynllava_plugin.bench.resident import resident_bytes
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.subject import Prompts, Subject
from dynllava_plugin.sparsity.cache import SparseContextCache


@dataclass
class Run:
    """A benchmark run.

    Parameters
    ----------
    subject : Subject
    rows : Rows
    modes : list of Mode
        "full" first.
    batches, lengths : list of int
        Batch sizes; generated tokens at which to measure.
    paths : list of str
        Of `parsers.PATHS`: how decode steps run.
    repeats, warmup : int
        Measured and unmeasured turns of every call.
    """

    subject: Subject
    rows: Rows
    modes: list[Mode]
    batches: list[int]
    lengths: list[int]
    paths: list[str]
    repeats: int
    warmup: int

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.subject.device

    def new_cache(self, path: str) -> SparseContextCache:
        """A cache for the model's present mode that decodes in the given way."""
        if path == "eager":
            return self.subject.model.new_cache()
        compiling = {"fullgraph": True} if path == "compiled" else None
        return self.subject.model.new_cache("static", compiling)

    def switch(self, name: str) -> None:
        """Bring the model into the mode of this name."""
        self.subject.switch(next(mode for mode in self.modes if mode.name == name))

    def add(self, **values: Any) -> dict[str, Any]:
        """Store a row and show it."""
        row = self.rows.add(**values)
        print(describe(row), file=sys.stderr, flush=True)
        return row

    @property
    def parallel_modes(self) -> list[Mode]:
        """The modes that can take many tokens at once, without a cache."""
        return [mode for mode in self.modes if not mode.policy().sequential]

    def modes_on(self, path: str) -> list[Mode]:
        """The modes that can decode in the given way: what lets tokens go again has no static cache."""
        return self.modes if path == "eager" else self.parallel_modes

    def has(self, phase: str, modes: list[Mode] | None = None, **keys: Any) -> bool:
        """Whether the rows of all of `modes` (None: of the run's) are there already."""
        wanted = self.modes if modes is None else modes
        return self.rows.has({"phase": phase, "mode": mode.name, **keys} for mode in wanted)


def spaced(lengths: list[int], steps: int) -> list[int]:
    """The lengths in order, without those that lie within the `steps` fed while the one before is measured."""
    found: list[int] = []
    for length in sorted(lengths):
        if not found or length >= found[-1] + steps:
            found.append(length)
    return found


def describe(row: dict[str, Any]) -> str:
    """A row in one line."""
    parts = [
        f"{row['phase']:8s} {row['mode']:10s} {row.get('path', ''):8s} batch {row['batch']:<2d} at {row['length']:<5d}"
    ]
    if row.get("median_s") is not None:
        parts.append(f"{row['median_s'] * 1e3:10.2f} ms")
    if row.get("speedup") is not None:
        parts.append(f"{row['speedup']:5.2f}x")
    if row.get("of_ideal") is not None:
        parts.append(f"of ideal {row['ideal_speedup']:.2f}x: {row['of_ideal']:.2f}")
    for name in ("cache_bytes", "peak_bytes"):
        if row.get(name) is not None:
            parts.append(f"{name.removesuffix('_bytes')} {row[name] / 2**20:.0f} MiB")
    if row.get("fits") is False:
        parts.append("does not fit")
    return "  ".join(parts)


def against_full(full_time: float, time: float, full_cost: float, cost: float) -> dict[str, float]:
    """Measured and ideal speed-up over full context, and their ratio."""
    speedup, ideal = full_time / time, full_cost / cost
    return {"speedup": speedup, "ideal_speedup": ideal, "of_ideal": speedup / ideal}


def held_bytes(cache: SparseContextCache, subject: Subject) -> dict[str, Any]:
    """Bytes: of the buffers, of them really in memory (CPU), what the tokens need, and what one growth step of every layer adds."""
    token = subject.shape.kv_bytes(subject.itemsize)
    lengths = cache.kept_lengths()
    return {
        "cache_bytes": cache.num_bytes(),
        "resident_bytes": resident_bytes(t for t in cache.tensors() if t.dim() == 4),
        "needed_bytes": int(lengths.sum()) * token,
        "growth_bytes": lengths.numel() * cache.tracks[0].growth_step * token,
    }


def kept_share(cache: SparseContextCache) -> float | None:
    """Share of the output tokens fed so far that stay as context."""
    keep = cache.output_keep()
    return None if keep is None else round(float(keep.float().mean()), 4)


def kind(prompts: Prompts) -> str:
    """Whether the batch's prompts are of one length."""
    return "mixed" if prompts.mixed else "equal"
