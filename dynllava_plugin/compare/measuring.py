"""Every policy on every benchmark with one loaded checkpoint: figures, the bytes that a cache holds, prefill times."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dynllava_plugin.bench.timing import seconds, summary
from dynllava_plugin.compare.answers import Figure, Harness
from dynllava_plugin.compare.store import Store
from dynllava_plugin.compare.subjects import Subject
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import Benchmark
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.flops import DecoderShape, cache_bytes
from dynllava_plugin.policies import Policy
from dynllava_plugin.policies.contexts import context_of

TIMED_SAMPLES = 4


@dataclass
class Comparison:
    """A loaded checkpoint, the harness that asks it, and the folder of what was measured.

    Attributes
    ----------
    limit : int or None
        Questions of each task.
    first : bool
        Whether this process writes; the others of several only answer.
    """

    engine: Engine
    settings: ModelSettings
    harness: Harness
    store: Store
    limit: int | None
    first: bool

    @property
    def checkpoint(self) -> str:
        """Return the checkpoint's name."""
        return self.settings.checkpoint_name

    @property
    def family(self) -> str:
        """Return the `model_type` of the family's stock config."""
        return self.engine.model.config.model_type.removeprefix("dynamic_")

    def measure(
        self, wanted: Sequence[Subject], benchmarks: Sequence[Benchmark], fresh: bool, lenient: bool
    ) -> dict[str, list[str]]:
        """Measure what isn't measured yet; an unfinished benchmark goes on from its journal.

        Returns
        -------
        What an image refused to a policy, where that is `lenient`ly listed: titles by reason.
        """
        model, of = self.engine.model, {"limit": self.limit}
        # Decided at once: every process of several has to ask the same.
        pairs = [(subject, benchmark) for subject in wanted for benchmark in benchmarks]
        pairs = [pair for pair in pairs if fresh or not self.store.read(pair[1].name, pair[0], **of)]
        refused: dict[str, list[str]] = {}
        for number, (subject, benchmark) in enumerate(pairs, 1):
            if self.first:
                print(f"[{number}/{len(pairs)}] {subject.title}: {benchmark.name}", flush=True)
            journal = self.store.journal(benchmark.name, subject, **of)
            # A new engine: it may keep image features, and they may depend on the policy.
            engine = Engine(model, self.engine.processor, self.engine.batch_size)
            try:
                with subject.in_force(model):
                    figures, counts = self.harness.measure(engine, self.settings, benchmark, journal)
            except UserError as error:
                if not lenient:
                    raise
                refused.setdefault(subject.reason(error), []).append(f"{subject.title} on {benchmark.name}")
                continue
            if self.first:
                costs = {**counts, **cache_kib(model, subject.check(model), counts)}
                content = {"figures": [asdict(figure) for figure in figures], "costs": costs}
                self.store.write(benchmark.name, subject, content, **of)
                shutil.rmtree(journal, ignore_errors=True)
        return refused

    def time(self, wanted: list[Subject], benchmarks: Sequence[Benchmark], repeats: int, fresh: bool) -> None:
        """Measure prefill times of all wanted policies in one interleaved run a benchmark."""
        of = {"repeats": repeats, "with": [subject.title for subject in wanted]}
        for benchmark in benchmarks:
            kind = f"{benchmark.name}_time"
            if fresh or not all(self.store.read(kind, subject, **of) for subject in wanted):
                count = min(self.limit or TIMED_SAMPLES, TIMED_SAMPLES)
                inputs = self.harness.inputs(self.engine, benchmark, count)
                print(f"prefill times of {len(inputs)} samples of {benchmark.name}", flush=True)
                for subject, times in prefill_times(self.engine, wanted, inputs, repeats).items():
                    self.store.write(kind, subject, {"times": times}, **of)

    def everything(self) -> Iterator[tuple[Subject, str, list[Figure], dict[str, Any]]]:
        """Yield all that was ever measured of this checkpoint: the policy, the benchmark's name, its figures and costs."""
        for kind in sorted(
            path.name for path in self.store.folder.iterdir() if not path.name.endswith("_time")
        ):
            times = {subject: content["times"] for subject, content in self.store.everything(f"{kind}_time")}
            for subject, content in self.store.everything(kind):
                figures = [Figure(**values) for values in content["figures"]]
                yield subject, kind, figures, {**content["costs"], **times.get(subject, {})}


@torch.inference_mode()
def prefill_times(
    engine: Engine, subjects: Sequence[Subject], inputs: Sequence[dict[str, Any]], repeats: int
) -> dict[Subject, dict[str, float]]:
    """Return milliseconds from pixels and prompt to the first logits, one sample at a time, policies taking turns.

    Parameters
    ----------
    inputs : sequence of dict
        `model(...)` arguments of single samples.
    repeats : int
        Turns, after one that doesn't count.

    Returns
    -------
    For each subject ``prefill_ms`` (median over samples and turns), ``prefill_iqr_ms``.
    """
    model = engine.model
    times: dict[Subject, list[float]] = {subject: [] for subject in subjects}
    order = list(subjects)
    for sample in inputs:
        for turn in range(repeats + 1):
            # Each goes first in its turn: what the one before leaves in the caches is nobody's lasting advantage.
            for subject in order[turn % len(order) :] + order[: turn % len(order)]:
                with subject.in_force(model):
                    taken = seconds(partial(model, **sample, use_cache=True, logits_to_keep=1), model.device)
                if turn:
                    times[subject].append(taken)
    found = {}
    for subject, measured in times.items():
        facts = summary(measured)
        found[subject] = {"prefill_ms": 1e3 * facts["median_s"], "prefill_iqr_ms": 1e3 * facts["iqr_s"]}
    return found


def cache_kib(model: Any, policy: Policy, counts: Mapping[str, Any]) -> dict[str, float]:
    """Return ``cache_kib``: keys and values behind a prompt and its answer, from mean counts (`mean_counts`); empty without images."""
    total, kept = counts.get("image_tokens"), counts.get("kept_image_tokens")
    if not total or kept is None:
        return {}
    shape = DecoderShape.of(model.config.text_config)
    stays = counts.get("kept_output_share", 1.0)
    context = context_of(policy, shape.layers, total, kept, counts["prompt_tokens"] - total, stays)
    generated = max(0.0, counts["generated_tokens"] - 1)  # the last one isn't fed back
    return {"cache_kib": cache_bytes(shape, context, generated, model.dtype.itemsize) / 1024}  # type: ignore[arg-type]
