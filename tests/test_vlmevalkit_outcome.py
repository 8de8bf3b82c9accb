"""Whose outcome a VLMEvalKit folder holds, and that one run at a time writes there."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.locks import locks
from dynllava_plugin.evaluation.vlmevalkit import command
from dynllava_plugin.evaluation.vlmevalkit.outcome import check_run

NOW = 1.7e9  # a fixed moment, so that every process collects the same cases


def write(folder: Path, written: float | None) -> None:
    entry = {"status": "done", "metrics": {"Overall": 1.0}}
    if written is not None:
        entry["updated_at"] = datetime.fromtimestamp(written, UTC).isoformat()
    (folder / "status.json").write_text(json.dumps({"datasets": {"POPE": entry}}))


@pytest.mark.parametrize(("written", "counts"), [(NOW + 2, True), (None, True), (NOW - 60, False)])
def test_an_outcome_is_read_where_this_run_wrote_it(
    tmp_path: Path, written: float | None, counts: bool
) -> None:
    write(tmp_path, written)
    failures = check_run(tmp_path, "dynllava", ["POPE"], NOW)
    assert failures == [] if counts else failures[0].startswith("POPE: VLMEvalKit didn't finish it")


@pytest.mark.parametrize("content", ["", "[]", '{"datasets": '])
def test_a_damaged_outcome_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json: not a"):
        check_run(tmp_path, "dynllava", ["POPE"], NOW)


def test_two_runs_in_one_folder_are_refused(
    tmp_path: Path,
    easy_vqa_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "work"
    monkeypatch.setattr("sys.argv", ["run_vlmevalkit.py"])
    with locks({folder}, "this test"):
        flags = ["--pretrained", "tiny", "--data", "EasyVQA", "--limit", "1", "--work-dir", str(folder)]
        assert command.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {folder}: another `run_vlmevalkit.py` is writing there"
    assert [path.name for path in folder.iterdir()] == [".lock"]
