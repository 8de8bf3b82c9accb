"""The harnesses' own command lines for our model, as modules to run with ``python -m``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, VLMEVALKIT
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
    build = _lmms_eval if harness == LMMS_EVAL else _vlmevalkit
    command = [_MODULES[harness], "--model", "dynllava", *build(settings, tasks, batch_size, output)]
    return command + (["--limit", str(limit)] if limit else [])


def _lmms_eval(
    settings: ModelSettings, tasks: Sequence[str], batch_size: int | str, output: Path
) -> list[str]:
    given = {"pretrained": settings.pretrained, **settings.sparsity(), **settings.asking()}
    given |= {name: getattr(settings, name) for name in ("dtype", "attn_implementation", "quantization")}
    pairs = ",".join(f"{key}={value}" for key, value in given.items() if value is not None)
    command = ["--model_args", pairs, "--log_samples", "--tasks", ",".join(tasks)]
    command += ["--batch_size", str(batch_size), "--output_path", str(output)]
    return command + (["--device", settings.device] if settings.device else [])


def _vlmevalkit(
    settings: ModelSettings, tasks: Sequence[str], batch_size: int | str, output: Path
) -> list[str]:
    given = {**settings.sparsity(), **settings.asking(), "dtype": settings.dtype, "device": settings.device}
    given |= {name: getattr(settings, name) for name in ("attn_implementation", "quantization")}
    command = ["--pretrained", settings.pretrained]
    for key, value in given.items():
        command += [f"--{key.replace('_', '-')}", str(value)] if value is not None else []
    return [*command, "--data", *tasks, "--batch-size", str(batch_size), "--work-dir", str(output)]
