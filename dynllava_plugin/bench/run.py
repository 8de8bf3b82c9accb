"""What the phases that time a model share: the subject, the modes, the rows, and the ratio to full context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynllava_plugin.bench.modes import policy_in
from dynllava_plugin.bench.process import resident_bytes
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.subject import Prompts, Subject
from dynllava_plugin.bench.timing import Key, interleaved
from dynllava_plugin.sparsity.cache import SparseContextCache


@dataclass
class Run:
    """A benchmark run.

    Parameters
    ----------
    subject : Subject
    rows : Rows
    modes : list of str
        "full" first.
    batches, lengths : list of int
        Batch sizes; generated tokens at which to measure.
    paths : list of str
        Of `command.PATHS`: how decode steps run.
    repeats, warmup : int
        Measured and unmeasured turns of every call.
    """

    subject: Subject
    rows: Rows
    modes: list[str]
    batches: list[int]
    lengths: list[int]
    paths: list[str]
    repeats: int
    warmup: int

    def times(
        self,
        calls: Mapping[Key, Callable[[], Any]],
        repeats: int,
        before: Callable[[Key], None] = lambda key: None,
    ) -> dict[Key, list[float]]:
        """Return each call's seconds, the calls taking turns after this run's warm-up."""
        return interleaved(calls, self.subject.device, repeats, self.warmup, before)

    def new_cache(self, path: str) -> SparseContextCache:
        """Return a cache for the model's present mode that decodes in the given way."""
        if path == "eager":
            return self.subject.model.new_cache()
        compiling = {"fullgraph": True} if path == "compiled" else None
        return self.subject.model.new_cache("static", compiling)

    @property
    def parallel_modes(self) -> list[str]:
        """Return the modes that can take many tokens at once, without a cache."""
        return [mode for mode in self.modes if not policy_in(mode).sequential]

    def modes_on(self, path: str) -> list[str]:
        """Return the modes that can decode in the given way: what lets tokens go again has no static cache."""
        return self.modes if path == "eager" else self.parallel_modes

    def has(self, phase: str, modes: list[str] | None = None, **keys: Any) -> bool:
        """Return whether the rows of all of `modes` (None: of the run's) are there already."""
        wanted = self.modes if modes is None else modes
        return self.rows.has({"phase": phase, "mode": mode, **keys} for mode in wanted)


def spaced(lengths: list[int], steps: int) -> list[int]:
    """Return the lengths in order, without those that lie within the `steps` fed while the one before is measured."""
    found: list[int] = []
    for length in sorted(lengths):
        if not found or length >= found[-1] + steps:
            found.append(length)
    return found


def against_full(full_time: float, time: float, full_cost: float, cost: float) -> dict[str, float]:
    """Return the measured and the ideal speed-up over full context, and their ratio."""
    speedup, ideal = full_time / time, full_cost / cost
    return {"speedup": speedup, "ideal_speedup": ideal, "of_ideal": speedup / ideal}


def held(cache: SparseContextCache, subject: Subject) -> dict[str, Any]:
    """Return what a cache holds.

    Returns
    -------
    dict
        ``cache_bytes``: its buffers; ``resident_bytes``: of them really in memory (CPU); ``needed_bytes``: the tokens' own;
        ``growth_bytes``: what one growth step of every layer adds; ``kept_share``: of the output tokens fed, those that stay.
    """
    token, lengths, keep = subject.shape.kv_bytes(subject.itemsize), cache.kept_lengths(), cache.output_keep()
    return {
        "cache_bytes": cache.num_bytes(),
        "resident_bytes": resident_bytes(tensor for tensor in cache.tensors() if tensor.dim() == 4),
        "needed_bytes": int(lengths.sum()) * token,
        "growth_bytes": lengths.numel() * cache.tracks[0].growth_step * token,
        "kept_share": None if keep is None else round(float(keep.float().mean()), 4),
    }


def kind(prompts: Prompts) -> str:
    """Return whether the batch's prompts are of one length: "mixed" or "equal"."""
    return "mixed" if prompts.mixed else "equal"
