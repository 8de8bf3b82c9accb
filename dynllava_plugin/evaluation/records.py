"""The run manifest `dynllava_run.json`: what ran, where, for how long, and how many tokens were kept.

Adapters note answers while a harness runs; the command around the harness writes the file beside the
harness's output. One process evaluates one model at a time, so the notes are one object of this module (as
lmms-eval keeps its own).
"""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dynllava_plugin.evaluation.answers import Answer, mean_counts
from dynllava_plugin.evaluation.prefill_costs import prefill_costs
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.flops import DecoderShape
from dynllava_plugin.policies import Policy, policy_of

MANIFEST_NAME = "dynllava_run.json"
_PACKAGES = ("dynllava-plugin", "torch", "transformers", "lmms-eval", "ms-vlmeval", "nltk")


class RunRecord:
    """Notes of the model that this process evaluates."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything and start the clock."""
        self.started = time.time()
        self.settings: dict[str, Any] | None = None
        self.sparsity: dict[str, Any] | None = None
        self._costs: tuple[DecoderShape, Policy] | None = None
        self._answers: dict[str, list[Answer]] = defaultdict(list)

    def note_model(self, settings: ModelSettings, model: Any) -> None:
        """The model that was loaded; its sparsity settings are those in force, not only the overrides."""
        self.settings = {**settings.to_dict(), "checkpoint": settings.checkpoint_name}
        self.sparsity = model.config.sparsity.to_dict()
        self._costs = DecoderShape.of(model.config.text_config), policy_of(model.config.sparsity)

    def note_answers(self, benchmark: str, answers: Sequence[Answer]) -> None:
        """Answers to questions of `benchmark` (the harness's name)."""
        self._answers[benchmark].extend(answers)

    def to_dict(self, harness: str, **more: Any) -> dict[str, Any]:
        """The manifest."""
        return {
            "harness": harness,
            "settings": self.settings,
            "sparsity": self.sparsity,
            "tokens": {name: self._counts(answers) for name, answers in self._answers.items()},
            "seconds": round(time.time() - self.started, 1),
            "versions": versions(),
            "host": host(),
            **more,
        }

    def _counts(self, answers: Sequence[Answer]) -> dict[str, float | int]:
        counts = mean_counts(answers)
        return counts if self._costs is None else {**counts, **prefill_costs(*self._costs, counts)}


RECORD = RunRecord()


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Any]:
    """Processor, cores, memory and accelerator of this machine."""
    import torch

    facts: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts["processor"] = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, StopIteration, ValueError):
        facts["processor"] = platform.processor() or "unknown"
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name(0)
    facts["threads"] = torch.get_num_threads()
    return facts
