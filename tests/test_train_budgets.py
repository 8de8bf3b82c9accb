"""The comparison of budgets: every row once, whatever was measured before, with its tokens; summary and picture."""

from __future__ import annotations

import csv
import json

from dynllava_plugin.evaluation.own_sets.easy_vqa import BENCHMARKS
from tests.training_kit import save_checkpoint, save_mixture
from train import budgets


def test_rows_are_measured_once_and_summed_up(tmp_path, monkeypatch, capsys):
    mixture, images = save_mixture(tmp_path / "data")
    data = mixture.parent
    rows = json.loads(mixture.read_text())
    (data / "train.json").write_text(
        json.dumps([{**row, "image": f"{images.name}/{row['image']}"} for row in rows if "image" in row])
    )
    asked = [
        {"id": str(n), "image": f"images/{n}.png", "question": "what color is the shape", "answer": "red"}
        for n in range(3)
    ]
    for name in BENCHMARKS:
        (data / f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    short = [
        (budgets.EVERY, ["--vision_keep_rate", "0.1:0.6"], (0.5, 0.25)),
        (budgets.GATES, ["--gates", "2:0.75,3:0.3334"], (0.5,)),
    ]
    monkeypatch.setattr(budgets, "trainings", lambda rates: iter(short))
    command = ["--data", str(data), "--model", str(save_checkpoint(tmp_path / "model")), "--steps", "1"]
    command += ["--seeds", "1", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    assert budgets.main(command) == 0
    with (tmp_path / "out" / "budgets_rows.csv").open() as file:
        found = list(csv.DictReader(file))
    # 16 tokens in the first two of four layers; then 8, 4, or 12 and 4.
    assert [float(row["tokens"]) for row in found] == [12, 10, 12]
    assert [row["trained"] for row in found] == [budgets.EVERY, budgets.EVERY, budgets.GATES]
    assert all(0 <= float(row["accuracy"]) <= 100 and row["questions"] == "3" for row in found)
    capsys.readouterr()
    assert budgets.main(command) == 0 and not capsys.readouterr().out
    summary = (tmp_path / "out" / "budgets.csv").read_text().splitlines()
    assert len(summary) == 4 and summary[0].endswith("trained,budget,tokens,mean,std,count")
    assert (tmp_path / "out" / "budgets.png").stat().st_size > 10_000
    assert budgets.main([*command, "--steps", "0"]) == 2
    assert "--steps 0: must be positive" in capsys.readouterr().err


def test_two_gates_leave_as_many_tokens_as_one():
    """In the mean over the bundled model's six layers, of 64 tokens, but for rounding down."""
    for kind, flags, (*_, rate) in budgets.trainings(budgets.BUDGETS):
        if kind == budgets.GATES:
            (_, first), (_, second) = (part.split(":") for part in flags[1].split(","))
            assert abs(2 * float(first) + 2 * float(first) * float(second) - 4 * rate) < 1e-3
