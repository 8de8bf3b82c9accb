"""The harnesses' own command lines for our model, as modules to run with ``python -m``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, VLMEVALKIT
from dynllava_plugin.evaluation.options import flag
from dynllava_plugin.evaluation.settings import ModelSettings

_MODULES = {
    LMMS_EVAL: "dynllava_plugin.evaluation.lmms_eval.command",
    VLMEVALKIT: "dynllava_plugin.evaluation.vlmevalkit.command",
}


def module_and_arguments(
    harness: str,
    settings: ModelSettings,
    tasks: Sequence[str],
    batch_size: int | str,
    output: Path,
    limit: int | None,
) -> list[str]:
    """Return what follows ``python -m``: `tasks` of `harness`, their results and saved answers in `output`."""
    given = settings.given()
    if harness == LMMS_EVAL:
        device = given.pop("device", None)
        asked = ["--model_args", ",".join(f"{key}={value}" for key, value in given.items()), "--log_samples"]
        asked += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--output_path", str(output)]
        asked += ["--device", device] if device else []
    else:
        asked = [part for key, value in given.items() for part in (flag(key), str(value))]
        asked += ["--data", *tasks, "--batch-size", str(batch_size), "--work-dir", str(output)]
    return [_MODULES[harness], "--model", "dynllava", *asked, *(["--limit", str(limit)] if limit else [])]
