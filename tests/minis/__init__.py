"""Miniatures of every benchmark in its real schema, made of easy-VQA's images: `python -m tests.minis DIR`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.suite.data import HUB, KIT, LONG

TRUTH = "truth"
MARKER = "miniatures.txt"


def make_minis(folder: Path) -> None:
    """Write the miniatures whole or not at all.

    ``datasets/<owner>/<name>``: the hub's repositories; ``LMUData/*.tsv``: VLMEvalKit's files;
    ``generation/``: the long-answer sets, by `build-lvis` from a miniature of LVIS-Instruct4V;
    ``truth/<benchmark>.jsonl``: the questions and answers that all of them were made from.

    Raises
    ------
    UserError
        If `folder` holds something else, or easy-VQA isn't installed, or the folder can't be written.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UserError(f"{folder}: not empty and not made by tests.minis; name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            _write(made)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(made, folder)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror or error})") from None


def _write(folder: Path) -> None:
    from dynllava_plugin.evaluation.benchmarks import BENCHMARKS
    from dynllava_plugin.files import write_text
    from tests.minis import hub_choice, hub_modern, hub_short
    from tests.minis.hub import Config, write_repo
    from tests.minis.items import RECIPES, items_of
    from tests.minis.kit_sets import write_tsvs
    from tests.minis.long_answers import write_generation_sets

    recipes: dict[str, Callable[[], dict[str, Config]]] = {
        "VQAv2": hub_short.vqav2,
        "GQA": hub_short.gqa,
        "VizWiz": hub_short.vizwiz,
        "SciQA": hub_choice.scienceqa,
        "TextVQA": hub_short.textvqa,
        "POPE": hub_short.pope,
        "MME": hub_short.mme,
        "MMBench": hub_choice.mmbench,
        "SEED": hub_choice.seedbench,
        "MM-Vet": hub_short.mmvet,
        "LLaVA-Wild": hub_short.llava_in_the_wild,
        "MMVP": hub_choice.mmvp,
        "RealWorldQA": hub_choice.realworldqa,
        "CVBench-2D": hub_choice.cv_bench,
        "DocVQA": hub_modern.docvqa,
        "ChartQA": hub_modern.chartqa,
        "OCRBench": hub_modern.ocrbench,
        "AI2D": hub_modern.ai2d,
        "MMStar": hub_modern.mmstar,
        "MMMU": hub_modern.mmmu,
    }
    repos = {benchmark.name: benchmark.repo for benchmark in BENCHMARKS}
    for name, recipe in recipes.items():
        write_repo(folder / HUB, repos[name], recipe())
    write_tsvs(folder / KIT)
    write_generation_sets(folder / LONG)
    for name in RECIPES:
        lines = [item.to_json() for item in items_of(name)]
        write_text(folder / TRUTH / f"{name}.jsonl", "\n".join(lines) + "\n")
    write_text(folder / MARKER, "Made by `python -m tests.minis`, which may replace this folder.\n")
