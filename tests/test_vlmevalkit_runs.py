"""`run_vlmevalkit.py` around the kit: its folders, journal, manifest and bad input, without running the kit."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answers import Answer
from dynllava_plugin.evaluation.judges import Judge
from dynllava_plugin.evaluation.results.manifest import NAME
from dynllava_plugin.evaluation.results.record import RunRecord, write_joined
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.settings import ModelSettings, as_folder_name
from dynllava_plugin.evaluation.vlmevalkit import command
from dynllava_plugin.evaluation.vlmevalkit.arguments import KitSettings, own_parser, settings_of
from dynllava_plugin.evaluation.vlmevalkit.setup import check_datasets

ANSWER = Answer("yes", 1, 0, 0, 1, 0, 0)
JUDGE = Judge("gpt", "http://host/v1")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"model": ["dynllava"], "data": {}}'])
def test_a_bad_config_is_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert command.main(["--config", str(path), "--work-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(path) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "--data: name at least one dataset"),
        (["--data", "EasyVQA", "EasyVQAA"], "--data EasyVQAA: no such dataset; did you mean EasyVQA or "),
    ],
)
def test_datasets_are_checked_before_the_kit_writes_anything(
    flags: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMUData", str(tmp_path))
    assert command.main(["--model", "dynllava", "--pretrained", "tiny", *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {problem}")
    assert not list(tmp_path.iterdir())


def test_a_users_own_tsv_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMUData", str(tmp_path))
    with pytest.raises(UserError, match="--data Mine: no such dataset"):
        check_datasets(["Mine"])
    (tmp_path / "Mine.tsv").write_text("index\tquestion\n")
    check_datasets(["Mine", "POPE", "Video-MME_8frame"])


def test_ones_own_questions_are_answered_without_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRED_FORMAT", "tsv")
    monkeypatch.setenv("LMUData", str(tmp_path))
    picture = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    rows = [f"{index}\t{image}\tWhat color is this?\n" for index in range(2)]
    (tmp_path / "Mine.tsv").write_text("".join(["index\timage\tquestion\n", *rows]))
    typed = ["--model", "dynllava", "--pretrained", "tiny", "--data", "Mine", "--data-root", "."]
    assert command.main([*typed, "--work-dir", "out"]) == 0
    assert command.VARIABLE not in os.environ  # the next run of this process has a journal of its own
    answers = pd.read_csv("out/dynllava/dynllava_Mine.tsv", sep="\t")
    assert len(answers) == 2 and answers["prediction"].notna().all()
    assert (
        "Mine: nothing to compare with; the answers are out/dynllava/dynllava_Mine.*"
        in capsys.readouterr().out
    )


def test_whatever_changes_an_answer_changes_the_folder() -> None:
    def name(*flags: str) -> str:
        own, _ = own_parser().parse_known_args(["--pretrained", "tiny", *flags])
        settings, asked, _ = settings_of(own)
        return as_folder_name([settings.slug(), *asked.labels()])

    assert settings_of(own_parser().parse_known_args(["--batch-size", "auto"])[0])[1].batch_size == "auto"
    names = [name(), name("--prompts", "kit"), name("--max-new-tokens", "5"), name("--limit", "3")]
    assert len(set(names)) == 4 and names[0] == name("--batch-size", "2", "--prompts", "llava") == "tiny"


def test_a_killed_run_leaves_its_answers_to_the_same_model_and_code_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def journal(*flags: str, mode: str | None = None) -> Path | None:
        monkeypatch.setenv(command.VARIABLE, "")  # so that what the command sets is undone
        monkeypatch.delenv(command.VARIABLE)
        own, _ = own_parser().parse_known_args(list(flags))
        return command._journal(tmp_path, ModelSettings(pretrained="tiny", mode=mode), settings_of(own)[1])

    first = journal()
    assert first is not None and first == journal() == Path(os.environ[command.VARIABLE])
    others = [journal(mode="full"), journal("--prompts", "kit"), journal("--max-new-tokens", "5")]
    monkeypatch.setattr(command, "source_digest", lambda: "other")
    assert len({first, *others, journal()}) == 5
    monkeypatch.setenv(command.VARIABLE, "elsewhere")  # `dynllava eval` has a place for them
    assert command._journal(tmp_path, ModelSettings(pretrained="tiny"), KitSettings()) is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work-dir in which MM-Vet's questions were answered and not scored."""
    monkeypatch.setattr(command, "judge_failures", lambda folder: {})
    folder = tmp_path / "dynllava"
    folder.mkdir()
    ended(folder, {"MMVet": {"skip_reason": "mode_infer"}}, ["MMVet"], None)
    return folder


def ended(
    folder: Path,
    status: dict[str, Any],
    datasets: list[str],
    judge: Judge | None,
    asks: bool = True,
    reused: bool = False,
) -> None:
    """What is there after a run of `datasets`, one question each."""
    path = folder / "status.json"
    known = json.loads(path.read_text())["datasets"] if path.is_file() else {}
    path.write_text(json.dumps({"model_name": "dynllava", "datasets": {**known, **status}}))
    record = RunRecord()
    if asks:
        record.settings, record.sparsity = {"checkpoint": "m"}, {"mode": "image"}
        for name in datasets:
            record.note_answers(name, [ANSWER])
    facts = {"prompts": "llava", **command._scored(folder, judge, datasets, reused)}
    write_joined(folder / NAME, record, datasets, facts)


def status(folder: Path, benchmark: str) -> str:
    table = read_results(folder).set_index("benchmark")
    return table.loc[benchmark, "status"]


def test_inferred_first_and_judged_later(folder: Path) -> None:
    assert status(folder, "MM-Vet") == "needs judge"
    ended(folder, {"MMVet": {"metrics": {"Category=Overall|acc": 31.0}}}, ["MMVet"], JUDGE, asks=False)
    assert status(folder, "MM-Vet") == "scored"
    ended(
        folder, {"POPE": {"metrics": {"Overall": 80.0}}}, ["POPE"], None
    )  # another dataset, without a judge
    assert status(folder, "MM-Vet") == status(folder, "POPE") == "scored"
    assert set(read_results(folder)["n"]) == {1}  # both datasets' counts are there
    ended(
        folder, {"MMVet": {"metrics": {"Category=Overall|acc": 31.0}}}, ["MMVet"], None
    )  # asked again, not scored again
    assert status(folder, "MM-Vet") == "needs judge"


def test_two_judged_datasets_in_one_folder(folder: Path) -> None:
    metrics = {"MMVet": "Category=Overall|acc", "LLaVABench": "split=overall|Relative Score (main)"}
    for name, key in metrics.items():
        ended(folder, {name: {"metrics": {key: 31.0}}}, [name], JUDGE)
    assert status(folder, "MM-Vet") == status(folder, "LLaVA-Wild") == "scored"


def test_reused_answers_are_counted(folder: Path) -> None:
    (folder / "dynllava_POPE.tsv").write_text("index\tprediction\n1\tyes\n2\tno\n3\tno\n")
    ended(folder, {"POPE": {"metrics": {"Overall": 80.0}}}, ["POPE"], None, reused=True)
    assert read_results(folder).set_index("benchmark").loc["POPE", "n"] == 3


def test_samples_of_one_id_are_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit keeps answers by index: equal ones would be one answer."""
    from dynllava_plugin.evaluation.vlmevalkit import datasets

    row = {"id": "7", "image": "a.png", "turns": [("What?", "this")]}
    monkeypatch.setattr(datasets, "load_rows", lambda name: [row, row])
    data = datasets.GenerationSet("LVIS_VQA_Single").data
    assert list(data["index"]) == [0, 1] and list(data["id"]) == ["7", "7"]
