"""The run manifests under a results folder, summed up for a table's footer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import saved_json
from dynllava_plugin.markup import MARKDOWN

STATE = "run.json"  # of a run in a suite


def footer(folders: Iterable[Path]) -> str:
    """Return what ran, on what: versions, commit, checkpoint, device, time. Empty where no run left a manifest."""
    from dynllava_plugin.evaluation.results.manifest import NAME, read_manifest

    manifests, states = [], set()
    for path in sorted({path for folder in folders for path in folder.rglob(f"*{NAME}")}):
        try:
            manifests.append(read_manifest(path))
        except UserError:
            continue  # a table is worth more than its footer
        states.add(_state_of(path))
    if not manifests:
        return ""
    versions: dict[str, list[str]] = {}
    for manifest in manifests:
        for name, number in (manifest.get("versions") or {}).items():
            versions.setdefault(name, []).append(str(number))
    lines = [
        "Versions: " + ", ".join(f"{name} {_all(numbers)}" for name, numbers in versions.items()),
        "Commit: " + _all(manifest.get("commit") for manifest in manifests),
        "Checkpoint: " + _all(_checkpoint(manifest) for manifest in manifests),
        "Device: " + _all(_device(manifest) for manifest in manifests),
        "Counted as wrong, as the judge named no option for them: " + _all(map(_unmatched, manifests)),
        _time([manifest.get("seconds") or 0 for manifest in manifests], states),
    ]
    return (
        "\n" + "\n".join(f"{line.translate(MARKDOWN)}  " for line in lines if not line.endswith(": ")) + "\n"
    )


def _time(answering: list[float], states: set[Path | None]) -> str:
    """From loading the model to the last answer; where a suite ran them all, the whole processes' too."""
    text = f"Time: answering {sum(answering):.0f} s in {count_of_runs(len(answering))}"
    whole = [saved_json(state).get("seconds") if state else None for state in states]
    known = [seconds for seconds in whole if isinstance(seconds, (int, float))]
    return f"{text}, whole processes {sum(known):.0f} s" if len(known) == len(whole) else text


def _state_of(manifest: Path) -> Path | None:
    """Where a suite wrote down how a run went: beside the folder `output` that holds the manifest."""
    return next(
        (parent.with_name(STATE) for parent in manifest.resolve().parents if parent.name == "output"), None
    )


def count_of_runs(number: int) -> str:
    """Return a number as ``1 run``, ``2 runs``."""
    return f"{number} run" if number == 1 else f"{number} runs"


def _checkpoint(manifest: dict[str, Any]) -> str | None:
    settings = manifest.get("settings") or {}
    name, digest = settings.get("checkpoint"), manifest.get("checkpoint_hash")
    return f"{name} ({digest})" if name and digest else name


def _unmatched(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in (manifest.get("unmatched") or {}).items())


def _device(manifest: dict[str, Any]) -> str | None:
    host = manifest.get("host") or {}
    return host.get("accelerator") or (
        f"{host.get('processor')}, {host.get('cores')} cores" if host else None
    )


def _all(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))
