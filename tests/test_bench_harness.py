"""`dynllava bench harness`: the commands it runs, what it makes of their manifests, its report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dynllava_plugin.bench import harness
from dynllava_plugin.bench.report import markdown, medians
from dynllava_plugin.cli import main


def cells(table: str, *first: str) -> list[str]:
    """What stands behind the `first` cells of a line in a Markdown table."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return next(line[len(first) :] for line in lines if line[: len(first)] == list(first))


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Each run only writes what its harness would; run k takes 2 k seconds alone and 6 / k in batches; batches of 3 differ."""
    commands: list[list[str]] = []

    def write(command: list[str], log: Path) -> int:
        commands.append(command)
        ours = command[2].endswith("lmms_eval.command")
        folder = Path(value(command, "--output_path" if ours else "--work-dir"))
        batch = int(value(command, "--batch_size" if ours else "--batch-size"))
        answers = ["red", "no", "yes" if batch == 3 else "blue", "yes"]
        if ours:
            lines = [
                json.dumps({"doc_id": i, "filtered_resps": [text]})
                for i, text in reversed([*enumerate(answers)])
            ]
            (folder / "x_samples_easy_vqa.jsonl").write_text("\n".join(lines))
        else:
            rows = "\n".join(f"{i}\t{text}" for i, text in enumerate(answers))
            (folder / "dynllava_EasyVQA.tsv").write_text(f"index\tprediction\n{rows}\n")
        seconds = 2.0 * len(commands) if batch == 1 else 6.0 / len(commands)
        times = {"answering": seconds, "engine": 0.95 * seconds, "model": 0.9 * seconds}
        manifest = {"engine_seconds": times, "shared_prompts": 0 if batch == 1 else 2}
        (folder / "dynllava_run.json").write_text(json.dumps(manifest))
        return 0

    monkeypatch.setattr(harness.processes, "run", write)
    return commands


def test_runs_take_turns_and_the_report_has_ratios_to_one_at_a_time(
    ran: list[list[str]], tmp_path: Path
) -> None:
    flags = [
        "--batch",
        "1,8",
        "--limit",
        "4",
        "--repeats",
        "2",
        "--policy",
        "full",
        "--pretrained",
        "tiny",
    ]
    assert main(["bench", "harness", *flags, "--output", str(tmp_path)]) == 0
    order = [(command[2].split(".")[-1], "--batch_size" in command, command) for command in ran]
    assert [ours for _, ours, _ in order] == [True, True, False, False] * 2
    assert value(ran[0], "--model_args") == "pretrained=tiny,policy=full"
    assert value(ran[3], "--pretrained") == "tiny" and value(ran[3], "--policy") == "full"
    assert [value(command, "--limit") for command in ran] == ["4"] * 8
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["harness"], row["batch"]) for row in rows] == [
        ("lmms-eval", "1"), ("lmms-eval", "8"), ("vlmevalkit", "1"), ("vlmevalkit", "8"),
    ]  # fmt: skip
    # Of lmms-eval 2 and 3 seconds (k = 1, 2), then 10 and 1 (k = 5, 6); a ratio is of one turn.
    assert float(rows[1]["questions_per_s"]) == pytest.approx((4 / 3 + 4 / 1) / 2)
    assert float(rows[1]["speedup"]) == pytest.approx((2 / 3 + 10 / 1) / 2)
    assert float(rows[1]["outside_model"]) == pytest.approx(0.1) and float(rows[1]["shared"]) == 0.5
    assert [row["same_answers"] for row in rows] == ["yes"] * 4
    text = (tmp_path / "table.md").read_text()
    assert cells(text, "lmms-eval", "8") == ["2.7", "5.33", "10.0%", "50%", "yes"]
    assert (tmp_path / "chart.png").stat().st_size > 1000 and (tmp_path / "machine.json").is_file()
    # The rows alone make the same report, on any machine; a rerun measures nothing again.
    assert main(["bench", "report", str(tmp_path / "rows.json"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "table.csv").read_text() == (tmp_path / "table.csv").read_text()
    assert main(["bench", "harness", *flags, "--output", str(tmp_path), "--resume"]) == 0 and len(ran) == 8


def test_other_answers_in_a_batch_are_shown(ran: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert (
        main(["bench", "harness", "--batch", "1,3", "--limit", "4", "--repeats", "1", "--json", str(path)])
        == 0
    )
    table = medians(json.loads(path.read_text()))
    assert table["same_answers"].tolist() == ["yes", "NO", "yes", "NO"]
    alone = medians([row for row in json.loads(path.read_text()) if row["batch"] == 3])
    assert alone["same_answers"].isna().all() and alone["speedup"].isna().all()
    assert cells(markdown(alone.to_dict("records")), "lmms-eval", "3")[1] == "-"


def test_rows_of_other_settings_are_measured_beside(ran: list[list[str]], tmp_path: Path) -> None:
    flags = [
        "--batch",
        "1",
        "--repeats",
        "1",
        "--harness",
        "lmms-eval",
        "--output",
        str(tmp_path),
        "--resume",
    ]
    for more in (["--limit", "4"], ["--limit", "3"], ["--limit", "4", "--policy", "fastv"]):
        assert main(["bench", "harness", *flags, *more]) == 0
    assert len(ran) == 3 and (tmp_path / "table.md").read_text().count("| lmms-eval ") == 3


def test_an_interruption_before_the_first_row_is_no_error(
    ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.processes, "run", interrupt)
    assert main(["bench", "harness", "--output", str(tmp_path)]) == 130
    assert main(["bench", "report", str(tmp_path / "rows.json"), "--output", str(tmp_path)]) == 2
    assert "no rows in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--batch", "8,16"], "--batch: [8, 16] must have 1 in it"),
        (["--batch", "1,x"], "--batch: '1,x'"),
        (["--harness", "helm"], "--harness: helm; choose from lmms-eval, vlmevalkit"),
        (["--limit", "0"], "--limit: 0 is less than 1"),
        (["--benchmark", "easy_vqua"], "easy_vqa"),
        (["--benchmark", "vqav2-test"], "vqav2-test isn't one task in vlmevalkit"),
    ],
)
def test_bad_flags_end_before_anything_runs(
    flags: list[str], problem: str, ran: list, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", "harness", *flags]) == 2 and problem in capsys.readouterr().err and not ran


def test_a_failed_run_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(command: list[str], log: Path) -> int:
        log.write_text("Traceback\nerror: nowhere: no such checkpoint\nbye\n")
        return 2

    monkeypatch.setattr(harness.processes, "run", fail)
    assert main(["bench", "harness", "--batch", "1"]) == 2
    assert "lmms-eval, batch 1: ended with 2 (nowhere: no such checkpoint)" in capsys.readouterr().err
