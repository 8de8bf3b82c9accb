"""`make bench-cpu`, line by line on tiny shapes: every line runs, and what was interrupted goes on to the same tables."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dynllava_plugin.bench import loading, report, rows, timing, train, train_step
from dynllava_plugin.bench.command import main

ROOT = Path(__file__).parents[1]
SMALL = {
    "all": ["--image-tokens", "16", "--text-tokens", "8"],
    "load": [],
    "train": ["--lengths", "32", "--text-tokens", "8"],
}


def lines(folder: Path) -> list[list[str]]:
    """What make would run into `folder`, on a shape and for as long as a test has time for."""
    told = subprocess.run(
        ["make", "-n", "bench-cpu", f"OUT={folder}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = re.findall(r"-m dynllava_plugin\.bench (.*)", told.stdout.replace("\\\n", ""))
    commands = [shlex.split(line) for line in found]
    for command in commands:
        if command[0] != "report":
            command += ["--shape", "4x256x4", "--repeats", "1", *SMALL[command[0]]]
        if "--at" in command:
            command += ["--at", "0,10"]
        if "--batch" in command:
            command += ["--batch", "1,2" if "1," in command[command.index("--batch") + 1] else "3"]
    return commands


def made(folder: Path) -> int:
    """Run the lines as make does, up to the first that fails."""
    return next((status for status in map(main, lines(folder)) if status), 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that tells the same of every call, no processes of their own, no charts, images of 16 tokens in training."""
    monkeypatch.setattr("dynllava_plugin.bench.shapes.VOCABULARY", 300)
    monkeypatch.setattr("dynllava_plugin.bench.score.ANSWER", 4)
    monkeypatch.setattr("dynllava_plugin.bench.run.resident_bytes", lambda tensors: sum(1 for _ in tensors))
    monkeypatch.setattr(timing, "seconds", lambda call, device: (call(), 0.5)[1])
    monkeypatch.setattr(loading, "in_a_process", lambda call, *arguments: (0.5, 1000))
    monkeypatch.setattr(train, "peak", lambda case, name: 1000)
    monkeypatch.setattr(train, "peak_flops", lambda *_: (1e12, "a test"))
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    monkeypatch.setattr(report, "draw", lambda table, folder: None)
    monkeypatch.setattr(train_step, "IMAGE_TOKENS", 16)
    monkeypatch.setitem(train_step.SMALL_TOWER, "image_size", 16)


def test_interrupted_in_every_line_it_goes_on_to_the_same_tables(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert made(whole) == 0
    added, interrupted = rows.Rows.add, set()

    def add(self: rows.Rows, **values: object) -> None:
        """Interrupt each phase once, before its second row."""
        phase = values["phase"]
        if phase not in interrupted and any(row["phase"] == phase for row in self.rows):
            interrupted.add(phase)
            raise KeyboardInterrupt
        added(self, **values)

    monkeypatch.setattr(rows.Rows, "add", add)
    for command in lines(parts):
        status = main(command)
        while status:
            assert status == 130
            status = main(command)
    assert interrupted == {
        "prefill", "decode", "batching", "nocache", "memory", "score", "load", "attention", "step"
    }  # fmt: skip
    monkeypatch.setattr(rows.Rows, "add", lambda self, **values: pytest.fail(f"measured again: {values}"))
    assert made(parts) == 0
    for name in ("efficiency/table.md", "efficiency/table.csv", "training/table.md", "training/table.csv"):
        assert (parts / name).read_text() == (whole / name).read_text(), name
