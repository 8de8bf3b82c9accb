"""The campaign: what every entry point must refuse, in one line that names it, with nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign import inputs
from tests.campaign.cases import CASES
from tests.campaign.running import prepare, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where every bad input lies, beside the bundled checkpoint as this package saves it."""
    from dynllava_plugin import load_model

    inputs.MODEL = tmp_path_factory.mktemp("model")
    for part in load_model("tiny", device="cpu"):
        part.save_pretrained(inputs.MODEL)
    folder = tmp_path_factory.mktemp("campaign")
    prepare(folder)
    yield folder


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_it_is_large() -> None:
    assert len(set(CASES)) == len(CASES) > 900


@pytest.mark.parametrize("entry", dict.fromkeys(case.entry for case in CASES))
def test_refused_in_one_line_with_nothing_written(entry: str, folder: Path) -> None:
    before, faults = _files(folder), []
    for case in CASES:
        if case.entry != entry:
            continue
        fault = run(case, folder).fault(case)
        if written := _files(folder) - before:
            fault = f"{fault or ''} wrote {', '.join(sorted(written)[:3])}"
            shutil.rmtree(folder / "new", ignore_errors=True)
        if fault is not None:
            faults.append(f"{case}: {fault}")
    assert not faults, f"{len(faults)} of {entry}:\n" + "\n".join(faults)
