"""Where a benchmark's data lies: given locally, in the hub's cache, or nowhere, in which case it says how to get it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, Benchmark

# Of a folder given as `--data`.
HUB, KIT, LONG = "datasets", "LMUData", "generation"


def is_offline() -> bool:
    """Whether the user forbade downloads."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in values)


def locate(benchmark: Benchmark, harness: str, data: Path | None) -> Path | None:
    """The file or folder with the benchmark's data on this machine; None where a download is needed."""
    candidates: list[Path] = []
    if harness == LMMS_EVAL:
        candidates = [data / HUB / benchmark.repo] if data else []
        candidates += [Path(benchmark.repo), _hub_cache() / f"datasets--{benchmark.repo.replace('/', '--')}"]
    else:
        for name in benchmark.tasks(harness):
            roots = [data / KIT] if data else []
            roots += [Path(os.environ.get("LMUData") or Path.home() / "LMUData")]
            candidates += [root / f"{name}.tsv" for root in roots]
        if benchmark.name == "VQAv2":  # made from lmms-eval's copy
            candidates += [found] if (found := locate(benchmark, LMMS_EVAL, data)) else []
    return next((path for path in candidates if path.exists()), None)


def is_ours(benchmark: Benchmark) -> bool:
    """Whether the data comes with this package or is built by it."""
    return not benchmark.repo


def how_to_provide(benchmark: Benchmark, harness: str) -> str:
    """One line for a user whose machine can't download it."""
    if harness == LMMS_EVAL or benchmark.name == "VQAv2":
        target = f"DIR/{HUB}/{benchmark.repo}"
        fetch = f"hf download {benchmark.repo} --repo-type dataset --local-dir {target}"
        return f"dataset {benchmark.repo} isn't here and can't be downloaded; run `{fetch}`, then --data DIR"
    names = " and ".join(f"{name}.tsv" for name in benchmark.tasks(harness))
    return (
        f"{names} isn't here and can't be downloaded; put it into DIR/{KIT} (VLMEvalKit's own files are at "
        "opencompass.openxlab.space/utils/VLMEval), then --data DIR"
    )


def identity(benchmark: Benchmark, harness: str, data: Path | None) -> str:
    """Changes when the data on this machine does; ``hub`` where it is downloaded."""
    place = locate(benchmark, harness, data) if not is_ours(benchmark) else _own_data(benchmark, data)
    if place is None:
        return "hub"
    if place.name.startswith("datasets--"):
        reference = place / "refs" / "main"
        return reference.read_text().strip() if reference.is_file() else "hub"
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.relative_to(place.parent)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _own_data(benchmark: Benchmark, data: Path | None) -> Path | None:
    if benchmark.name.startswith("easy_vqa"):
        from dynllava_plugin.evaluation.easy_vqa import data_folder

        folder = data_folder()
        return folder if folder.is_dir() else None
    return data / LONG if data and (data / LONG).is_dir() else None


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
