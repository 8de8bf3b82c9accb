"""`dynllava table` over what both harnesses really wrote, whole and damaged: never a traceback, a line for each file."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dynllava_plugin.cli import main
from dynllava_plugin.evaluation.lmms_eval import command
from dynllava_plugin.evaluation.patches import Patches
from dynllava_plugin.evaluation.results import results as results_module
from dynllava_plugin.evaluation.results.results import prediction_rows, read_results
from dynllava_plugin.evaluation.vlmevalkit.outcome import check_run

WRITTEN = Path(__file__).parent / "harness_files"
LMMS, LMMS_RUN = "lmms_eval_judged/*_results.json", "lmms_eval_judged/*_dynllava_run.json"
KIT, KIT_RUN = "vlmevalkit_judged/status.json", "vlmevalkit_judged/dynllava_run.json"
HARNESS = {LMMS: "lmms-eval", KIT: "vlmevalkit"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results_module, "_said", set())
    folder = tmp_path / "runs"
    shutil.copytree(WRITTEN, folder)
    for file in folder.rglob(
        "*"
    ):  # the judged run of each harness is the later one, whatever a checkout says
        later = "unjudged" not in str(file.relative_to(folder))
        os.utime(file, (1.7e9 + later, 1.7e9 + later))
    return folder


def statuses(table: pd.DataFrame, part: str) -> dict[tuple[str, str], tuple[Any, str]]:
    rows = table[[part in file for file in table["file"]]].to_dict("records")
    return {
        (row["harness"], row["benchmark"]): (None if pd.isna(row["value"]) else row["value"], row["status"])
        for row in rows
    }


@pytest.mark.parametrize("outcome", ["_judged", "_unjudged"])
def test_a_judge_s_figures_reach_the_table_and_its_silence_is_none(results: Path, outcome: str) -> None:
    other = "_judged" if outcome == "_unjudged" else "_unjudged"
    for harness in ("lmms_eval", "vlmevalkit"):
        shutil.rmtree(results / f"{harness}{other}")
    found = statuses(read_results(results), outcome)
    failed = {"MM-Vet": (None, "judge failed: 4 of 4"), "LLaVA-Wild": (None, "judge failed: 6 of 6")}
    given = {"MM-Vet": (50.0, "scored"), "LLaVA-Wild": (75.0, "scored")}
    expected = given if outcome == "_judged" else failed
    for harness in ("lmms-eval", "vlmevalkit"):
        assert {name: found[harness, name] for name in expected} == expected


def test_a_failed_judge_is_in_the_cell(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(results / "lmms_eval_judged")
    assert main(["table", str(results)]) == 0
    assert "judge failed: 4 of 4" in capsys.readouterr().out


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edited(content: bytes) -> bytes:
        value = json.loads(content)
        found = change(value)
        return json.dumps(value if found is None else found).encode()

    return edited


def put(*keys_and_value: Any) -> Callable[[bytes], bytes]:
    *keys, last, value = keys_and_value

    def change(content: dict[str, Any]) -> None:
        for key in keys:
            content = content[key]
        content[last] = value

    return edit(change)


DAMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    *(
        (name, damage)
        for name in (LMMS, LMMS_RUN, KIT, KIT_RUN)
        for damage in (
            lambda content: content[: len(content) // 2],
            lambda content: b"",
            lambda content: b"[]",
            lambda content: b'"text"',
            lambda content: b"null",
            lambda content: b"12",
            lambda content: b"\x00\xff\xfe\x80" * 40,
            lambda content: b"PK\x03\x04" + content,
            lambda content: content.decode().encode("utf-16"),
            lambda content: b"[" * 100_000,
            lambda content: b"\n".join(content.splitlines()[1:]),
        )
    ),
    (LMMS, put("results", [])),
    (LMMS, put("results", "mmvet", [1])),
    (LMMS, put("results", "mmvet", 3)),
    (LMMS, put("results", 5)),
    (LMMS, put("n-samples", [])),
    (LMMS, put("n-samples", "mmvet", 4)),
    (LMMS, put("n-samples", "mmvet", "effective", "four")),
    (LMMS, put("n-samples", "mmvet", "effective", {})),
    (LMMS, put("config", [])),
    (LMMS, put("config", "resolved_cli_args", 7)),
    (LMMS_RUN, put("settings", [1])),
    (LMMS_RUN, put("settings", "checkpoint", ["a"])),
    (LMMS_RUN, put("sparsity", "full")),
    (LMMS_RUN, put("sparsity", "vision_keep_rate", "much")),
    (LMMS_RUN, put("model", 3)),
    (LMMS_RUN, put("model", "dtype", {"a": 1})),
    (LMMS_RUN, put("tokens", [])),
    (LMMS_RUN, put("tokens", "mmvet", [])),
    (LMMS_RUN, put("tokens", "mmvet", "image_tokens", "many")),
    (LMMS_RUN, put("judge", "yes")),
    (LMMS_RUN, put("judge", "unanswered", [])),
    (LMMS_RUN, put("judge", "unanswered", 4)),
    (LMMS_RUN, put("checkpoint_hash", [])),
    (LMMS_RUN, put("seconds", "long")),
    (LMMS_RUN, put("versions", [])),
    (LMMS_RUN, put("host", [])),
    (LMMS_RUN, put("prompts", {})),
    (KIT, put("datasets", [])),
    (KIT, put("datasets", "MMVet", "metrics", [1])),
    (KIT, put("datasets", 5)),
    (KIT_RUN, put("questions", [])),
    (KIT_RUN, put("questions", {"MMVet": "all"})),
    (KIT_RUN, put("judge", "tasks", 3)),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_file_is_left_out_and_named(
    results: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage = DAMAGES[number]
    (path,) = results.glob(name)
    path.write_bytes(damage(path.read_bytes()))
    assert main(["table", str(results)]) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("skipped: ") and str(path.parent) in lines[0], printed.err
    # The others are there: the same harness's other run and the other harness's both.
    assert "judge failed: 4 of 4" in printed.out and "50.00" in printed.out


@pytest.mark.parametrize("value", ["nan", "Infinity", "true", '"50"', "null", "1" + "0" * 400])
@pytest.mark.parametrize("name", [LMMS, KIT])
def test_what_is_no_number_is_no_figure(results: Path, name: str, value: str) -> None:
    (path,) = results.glob(name)
    key = '"gpt_eval_score,none": 50.0' if name == LMMS else '"Category=Overall|acc": 50.0'
    text = path.read_text()
    assert key in text
    path.write_text(text.replace(key, key.replace("50.0", value.replace("nan", "NaN"))))
    assert statuses(read_results(path.parent), "") == {
        (HARNESS[name], "MM-Vet"): (None, "no figure"),
        (HARNESS[name], "LLaVA-Wild"): (75.0, "scored"),
    }


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        (LMMS, "gpt_eval_score,none", "mmvet_score,none"),
        (KIT, "Category=Overall|acc", "Category=Overall|score"),
    ],
)
def test_a_figure_under_another_name_is_told(
    results: Path, name: str, ours: str, theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another version of a harness may write it: the cell doesn't say that nobody ran it."""
    (path,) = results.glob(name)
    path.write_text(path.read_text().replace(ours, theirs))
    assert statuses(read_results(path.parent), "")[HARNESS[name], "MM-Vet"] == (None, "no figure")
    (line,) = capsys.readouterr().err.splitlines()
    key = ours.removesuffix(",none")
    assert line.startswith(f"skipped: {path}: ") and f"reports no {key}, but " in line and theirs in line


def test_the_kit_s_own_command_fails_for_a_figure_under_another_name(results: Path) -> None:
    (path,) = results.glob(KIT)
    assert check_run(path.parent, "dynllava", ["MMVet", "LLaVABench"], 0.0) == []
    path.write_text(path.read_text().replace("Overall|acc", "Overall|score"))
    (failure,) = check_run(path.parent, "dynllava", ["MMVet", "LLaVABench"], 0.0)
    assert failure.startswith("MMVet: vlmevalkit reports no Category=Overall|acc, but ")


@pytest.mark.parametrize(("limit", "code"), [(None, 1), (4, 0)])
def test_lmms_eval_s_own_command_fails_for_a_figure_under_another_name(
    results: Path, limit: int | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not under a limit, which may leave none of the questions that are counted."""
    (path,) = results.glob(LMMS)
    content = json.loads(path.read_text().replace("gpt_eval_score", "mmvet_score"))
    content |= {
        "date": path.name.removesuffix("_results.json"),
        "configs": content["results"],
    }  # the file's are cut
    runs = command._Runs([], None, Patches())
    asked = Namespace(tasks="mmvet", predict_only=False, limit=limit, output_path=str(path.parent))
    runs._check(asked, content, None, {})
    said = "error: task mmvet: lmms-eval reports no gpt_eval_score, but mmvet_score,none"
    assert runs.exit_code() == code and (said in capsys.readouterr().err) == bool(code)


def test_a_dataset_that_the_kit_could_not_score_is_no_unasked_one(results: Path) -> None:
    (path,) = results.glob(KIT)
    content = json.loads(path.read_text())
    content["datasets"]["LLaVABench"]["error_message"] = "no space left on device"
    content["datasets"]["MMVet"]["status"] = "infer"  # killed before its score: half done is not done
    path.write_text(json.dumps(content))
    assert statuses(read_results(path.parent), "") == {("vlmevalkit", "LLaVA-Wild"): (None, "no figure")}


def test_what_isn_t_a_file_is_left_out(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "20260101_000000_results.json").symlink_to("nowhere")
    (results / "20260102_000000_results.json").symlink_to("20260102_000000_results.json")
    (results / "20260103_000000_results.json").mkdir()
    (results / "more").mkdir()
    (results / "more" / "status.json").mkdir()
    assert main(["table", str(results)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith(f"skipped: {results}/") for line in lines)


def test_nothing_but_damage_is_one_error(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in results.rglob("*.json"):
        path.write_bytes(path.read_bytes()[:300])
    assert main(["table", str(results)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["skipped"] * 4 + ["error"]
    assert lines[-1].startswith(f"error: {results}: no results")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04cut", b"index\tprediction\n1\t\xff\xfe\n", b"\x00" * 50]
)
@pytest.mark.parametrize("ending", ["tsv", "xlsx"])
def test_damaged_predictions_are_no_count(
    tmp_path: Path, content: bytes, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_module, "_said", set())
    (tmp_path / f"dynllava_MMVet.{ending}").write_bytes(content)
    assert prediction_rows(tmp_path, "dynllava_MMVet") in (None, 0)


def test_a_kit_s_notes_of_one_start_are_no_run(results: Path) -> None:
    """A VLMEvalKit checkout leaves them beside the model's own: they had no checkpoint, so were a row "unknown"."""
    folder = results / "vlmevalkit_judged"
    (folder / "T20261126-022750").mkdir()
    shutil.copy(folder / "status.json", folder / "T20261126-022750")
    (folder / "T20261126_Gf175435d").mkdir()
    shutil.copy(folder / "status.json", folder / "T20261126_Gf175435d")
    table = read_results(folder)
    assert set(table["checkpoint"]) == {"tiny"} and len(table) == 2
