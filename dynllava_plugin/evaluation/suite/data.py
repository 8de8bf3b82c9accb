"""Where a benchmark's data lies: given locally, in the hub's cache, or nowhere, in which case it says how to get it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dynllava_plugin.evaluation.benchmarks import BUILT, LMMS_EVAL, Benchmark

# Of a folder given as `--data`.
HUB, KIT, LONG = "datasets", "LMUData", "generation"
# The identity of data that isn't on this machine yet.
DOWNLOAD = "hub"


def is_offline() -> bool:
    """Whether the user forbade downloads."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in values)


def locate(benchmark: Benchmark, harness: str, data: Path | None) -> Path | None:
    """Return the file or folder with the benchmark's data on this machine; None where a download is needed."""
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
    """Return one line for a user whose machine can't download it."""
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
    """Return what changes when the data on this machine does; `DOWNLOAD` where it isn't there yet."""
    place = _source(benchmark, harness, data)
    if place is None:
        return DOWNLOAD
    if place.name.startswith("datasets--"):  # the hub's cache
        reference = place / "refs" / "main"
        return reference.read_text().strip() if reference.is_file() else DOWNLOAD
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.relative_to(place.parent)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def identity_after(benchmark: Benchmark, harness: str, data: Path | None, planned: str) -> str:
    """Return what a run is to write down once it has ended, when `planned` was the identity before it began.

    The harness may have fetched the data, or newer data, in between. The user's own files it only reads: had
    they changed meanwhile, the answers would be the older ones'.
    """
    place = _source(benchmark, harness, data)
    given = is_ours(benchmark) or (data is not None and place is not None and place.is_relative_to(data))
    return planned if given and planned != DOWNLOAD else identity(benchmark, harness, data)


def _source(benchmark: Benchmark, harness: str, data: Path | None) -> Path | None:
    """Where the data comes from. VLMEvalKit's VQAv2 is written from lmms-eval's at its first use."""
    if is_ours(benchmark):
        return _own_data(benchmark, data)
    return locate(benchmark, LMMS_EVAL if benchmark.name == "VQAv2" else harness, data)


def _own_data(benchmark: Benchmark, data: Path | None) -> Path | None:
    if benchmark.data == BUILT:
        from dynllava_plugin.evaluation.own_sets.long_answers import data_folder as built_folder

        folder = data / LONG if data and (data / LONG).is_dir() else built_folder()
    else:
        from dynllava_plugin.evaluation.own_sets.easy_vqa import data_folder

        folder = data_folder()
    return folder if folder.is_dir() else None


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
