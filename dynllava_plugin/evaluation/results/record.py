"""What a run of ours writes down: an adapter notes its answers in a `RunRecord` while a harness runs, the command around it
writes them as `dynllava_run.json` beside the harness's output.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynllava_plugin.environment import host, versions
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answers import Answer, Score, mean_counts, mean_score_counts
from dynllava_plugin.evaluation.results.identity import checkpoint_hash, commit
from dynllava_plugin.evaluation.results.manifest import read_manifest
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.files import write_json
from dynllava_plugin.flops import DecoderShape, prefill_flops
from dynllava_plugin.policies import Policy, policy_of
from dynllava_plugin.policies.contexts import context_of

# What two runs of VLMEvalKit into one folder have to agree in for the first one's counts to stay.
_SAME_RUN = ("checkpoint_hash", "sparsity", "model", "prompts", "max_new_tokens")


class RunRecord:
    """Notes of one model in one run; the clock starts when it is made."""

    def __init__(self) -> None:
        self.started = time.time()
        self.settings: dict[str, Any] | None = None
        self.sparsity: dict[str, Any] | None = None
        self.model: dict[str, Any] | None = None
        self._pretrained = ""
        self._costs: tuple[DecoderShape, Policy] | None = None
        self._answers: dict[str, list[Answer]] = defaultdict(list)
        self._scores: dict[str, list[Score]] = defaultdict(list)
        self._times: dict[str, float] = {}
        self._shared_prompts = 0

    def note_model(self, settings: ModelSettings, model: Any) -> None:
        """Note the model that was loaded; its sparsity settings are those in force, not only the overrides."""
        self.settings = {**settings.to_dict(), "checkpoint": settings.checkpoint_name}
        self.sparsity = model.config.sparsity.to_dict()
        self.model = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": getattr(model.config, "_attn_implementation", None),
        }
        self._pretrained = settings.pretrained
        self._costs = DecoderShape.of(model.config.text_config), policy_of(model.config.sparsity)

    def note_answers(self, benchmark: str, answers: Sequence[Answer]) -> None:
        """Note answers to questions of `benchmark` (the harness's name)."""
        self._answers[benchmark].extend(answers)

    def note_scores(self, benchmark: str, scores: Sequence[Score]) -> None:
        """Scores of given answers of `benchmark`."""
        self._scores[benchmark].extend(scores)

    def note_time(self, engine: Any) -> None:
        """Note the seconds since the first question, of these in the engine, of these in the model; prompts that shared a prefill."""
        since = 0.0 if engine.started is None else time.perf_counter() - engine.started
        seconds = {"answering": since, "engine": engine.seconds, "model": engine.calls.seconds}
        self._times = {name: round(value, 3) for name, value in seconds.items()}
        self._shared_prompts = engine.calls.shared_prompts

    def gather(self) -> None:
        """Bring the notes of all processes of a distributed run to rank 0; every process has to call it."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (dict(self._answers), dict(self._scores), self._shared_prompts))
        self._answers, self._scores = defaultdict(list), defaultdict(list)
        self._shared_prompts = sum(shared for _, _, shared in everyone)
        for answers, scores, _ in everyone:
            for name, found in answers.items():
                self._answers[name].extend(found)
            for name, found in scores.items():
                self._scores[name].extend(found)

    def to_dict(self, harness: str, **more: Any) -> dict[str, Any]:
        """Return the manifest."""
        return {
            "harness": harness,
            "settings": self.settings,
            "checkpoint_hash": checkpoint_hash(self._pretrained) if self._pretrained else None,
            "sparsity": self.sparsity,
            "model": self.model,
            "tokens": {name: self._counts(answers) for name, answers in self._answers.items()},
            "scored": {name: mean_score_counts(scores) for name, scores in self._scores.items()},
            "seconds": round(time.time() - self.started, 1),
            "engine_seconds": self._times,
            "shared_prompts": self._shared_prompts,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "versions": versions(),
            "commit": commit(),
            "host": host(),
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            **more,
        }

    def _counts(self, answers: Sequence[Answer]) -> dict[str, float | int]:
        counts = mean_counts(answers)
        return counts if self._costs is None else {**counts, **prefill_costs(*self._costs, counts)}


def prefill_costs(shape: DecoderShape, policy: Policy, counts: Mapping[str, Any]) -> dict[str, float]:
    """Return ``equivalent_tokens`` and ``prefill_gflops`` of samples with the mean `counts` of `mean_counts`; empty without images."""
    total = counts.get("image_tokens")
    kept = counts.get("kept_image_tokens")
    if not total or kept is None:
        return {}
    context = context_of(policy, shape.layers, total, kept, counts["prompt_tokens"] - total)
    return {
        "equivalent_tokens": policy.image_tokens(total, kept, shape.layers),
        "prefill_gflops": prefill_flops(shape, context) / 1e9,
    }


def write_joined(
    path: Path, record: RunRecord | None, tasks: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write the manifest of a folder that one run of VLMEvalKit after another writes into.

    Parameters
    ----------
    record : RunRecord or None
        None where no question was asked, because an earlier run's answers were scored.
    tasks : sequence of str
        The run's datasets; what an earlier run of the same settings noted of others stays.
    facts : mapping
        Further entries; ``judge`` is that of `tasks`.
    """
    try:
        earlier = read_manifest(path)
    except UserError:
        earlier = {}  # it is written anew
    judge = facts.get("judge")
    before = earlier.get("judge") or {}
    others = [name for name in before.get("tasks", []) if name not in tasks]
    if others and judge is None:
        judge = {**before, "tasks": others}
    elif others and judge and (judge["model"], judge["url"]) == (before.get("model"), before.get("url")):
        judge = {**judge, "tasks": [*judge["tasks"], *others]}

    def joined(part: str, new: Mapping[str, Any]) -> dict[str, Any]:
        others = {name: value for name, value in (earlier.get(part) or {}).items() if name not in tasks}
        return {**others, **(new.get(part) or {})}

    if record is None or record.settings is None:
        if earlier:
            write_json(path, {**earlier, "judge": judge, "unmatched": joined("unmatched", facts)})
        return
    manifest = record.to_dict("vlmevalkit", **{**facts, "judge": judge})
    if all(earlier.get(key) == manifest.get(key) for key in _SAME_RUN):
        for part in ("tokens", "scored", "questions", "unmatched"):
            manifest[part] = joined(part, manifest)
    write_json(path, manifest)
