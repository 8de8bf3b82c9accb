"""`dynllava bench train`: rows, ratios, resuming, reports, memory; and that both attentions train the same model."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from dynllava_plugin.bench import plots, train
from dynllava_plugin.bench.attention import AttentionCase, model_attention, training_keep
from dynllava_plugin.bench.process import in_a_process
from dynllava_plugin.bench.shapes import SHAPES
from dynllava_plugin.bench.train_step import Step, StepSettings, epoch_hours, peak_flops
from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape

TINY = DecoderShape(3, 32, 64, 2, 2, 64, predictor_dim=16, predictor_ffn_dim=32)


def settings(**changes):
    values = dict(
        shape=TINY,
        device="cpu",
        dtype=torch.float32,
        batch=1,
        text=16,
        checkpointing=False,
        optimizer="adamw",
    )
    return StepSettings(**{**values, **changes})


@pytest.fixture
def measured(monkeypatch):
    """No processes: peaks by name. And a tiny shape."""
    peaks = {"plain": 1000, "ours": 100, "sdpa": 50}
    monkeypatch.setattr(train, "peak", lambda case, name: peaks[name])
    monkeypatch.setitem(SHAPES, "tiny", TINY)


ARGUMENTS = ["bench", "train", "--shape", "tiny", "--lengths", "16,32", "--repeats", "2", "--batch", "1",
             "--text-tokens", "16", "--device", "cpu"]  # fmt: skip


def test_rows_table_and_chart(measured, tmp_path, capsys):
    assert main([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    attention = [row for row in rows if row["phase"] == "attention"]
    assert [(row["length"], row["kept"], row["implementation"]) for row in attention] == [
        (n, kept, name) for n in (16, 32) for kept in ("paper", "all") for name in ("plain", "ours", "sdpa")
    ]
    for row in rows:
        assert row["memory_ratio"] == {"plain": 1.0, "ours": 0.1, "sdpa": 0.05}[row["implementation"]]
        base = next(
            r for r in rows
            if r["implementation"] == "plain" and all(r[k] == row[k] for k in ("phase", "kept", "length"))
        )  # fmt: skip
        assert row["time_ratio"] == pytest.approx(row["median_s"] / base["median_s"])
    ours = rows[-1]
    assert (ours["phase"], ours["implementation"], ours["length"]) == ("step", "ours", 592)
    assert ours["samples_per_s"] == pytest.approx(1 / ours["median_s"])
    assert ours["epoch_hours"][1] == pytest.approx(665_000 / ours["samples_per_s"] / 8 / 3600)
    assert ours["mfu"] == pytest.approx(ours["model_tflops"] / ours["median_s"] / ours["peak_tflops"])
    with open(tmp_path / "table.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    text = (tmp_path / "table.md").read_text()
    assert "0.100" in text and "A CUDA GPU: not measured" in text
    assert (tmp_path / "chart.png").stat().st_size > 1000 and (tmp_path / "machine.json").exists()


def test_each_devices_chart_is_of_its_own_lengths(tmp_path, monkeypatch):
    """The committed rows: no title cut, no axis beyond what was measured, SDPA as one line of all its lengths."""
    drawn = []
    monkeypatch.setattr(plots, "write_figure", lambda path, figure, **how: drawn.append(figure))
    table = pd.read_csv(Path(__file__).parents[1] / "results/training/table.csv")
    table = table[table["phase"] == "attention"]
    plots.draw_training(table, tmp_path / "chart.png")
    drawn[0].draw_without_rendering()
    for number, axis in enumerate(drawn[0].axes):
        lengths = sorted(
            set(table[table["device"] == list(dict.fromkeys(table["device"]))[number // 2]]["length"])
        )
        assert axis.get_xticks().tolist() == lengths and axis.get_xlim()[1] < 1.3 * lengths[-1]
        box = axis.title.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= drawn[0].bbox.x1
        (sdpa,) = [line for line in axis.lines if line.get_label().startswith("SDPA")]
        assert sdpa.get_xdata().tolist() == lengths
    assert drawn[0].axes[1].title.get_window_extent().x0 > drawn[0].axes[0].title.get_window_extent().x1


def test_an_interrupted_run_keeps_its_rows_and_goes_on(measured, tmp_path, monkeypatch, capsys):
    file, interleaved, calls = tmp_path / "rows.json", train.interleaved, []

    def second_is_interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interleaved(*args)

    monkeypatch.setattr(train, "interleaved", second_is_interrupted)
    arguments = [*ARGUMENTS, "--only", "attention", "--json", str(file)]
    assert main(arguments) == 130
    assert len(json.loads(file.read_text())) == 3
    assert main([*arguments, "--resume"]) == 0
    rows = json.loads(file.read_text())
    assert len(rows) == 12 and len(calls) == 2 + 3


def test_what_has_no_room_is_measured_smaller_or_left_out(measured, tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    shape = AttentionCase(32, 1, 2, 2, 16)
    monkeypatch.setattr(train, "free_bytes", lambda device: 2 * shape.plain_bytes)
    arguments = [*ARGUMENTS[:4], "--lengths", "32,64", "--only", "attention", "--kept", "all", "--batch", "5"]
    assert main([*arguments, "--device", "cpu", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["length"], row["batch"], row["implementation"]) for row in rows if row["fits"]] == [
        (32, 2, "plain"), (32, 2, "ours"), (32, 2, "sdpa"), (64, 1, "ours"), (64, 1, "sdpa")
    ]  # fmt: skip
    assert [row["implementation"] for row in rows if not row["fits"]] == ["plain"]
    assert all(row["time_ratio"] is None for row in rows if row["length"] == 64 and row["fits"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "all"], "--only: all; choose from attention, step"),
        (["--lengths", "a"], "--lengths: 'a' is not a comma-separated list"),
        (["--lengths", "0"], "--lengths: '0' must be numbers of at least 1"),
        (["--repeats", "0"], "--repeats: 0 is less than 1"),
        (["--batch", "0"], "--batch: 0 is less than 1"),
        (["--peak-tflops", "-3"], "--peak-tflops: -3.0 is less than"),
        (["--peak-tflops", "nan"], "--peak-tflops: nan is less than"),
        (["--text-tokens", "2"], "--text-tokens: 2 is less than 4"),
        (["--device", "tpu"], "device: 'tpu' is not a device"),
        (["--shape", "llava-1.5-70b"], "--shape: 'llava-1.5-70b' is neither one of"),
        (
            ["--json", "/proc/no/rows.json", "--only", "attention"],
            "--json /proc/no/rows.json: can't be written",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["bench", "train", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_peak_memory_of_a_process():
    """Several full matrices, but not the inputs and not the process."""
    peak = train.peak(AttentionCase(1024, 1, 2, 2, 16, kept="all"), "plain")
    if peak is None:
        pytest.skip("only Linux can reset the high-water mark of a process")
    assert 4 <= peak / (4 * 2 * 1024**2) <= 20  # a busy machine adds a few MiB


@pytest.mark.parametrize(
    ("call", "argument", "message"),
    [
        (int, "x", "bench: int failed: ValueError: invalid literal"),
        (
            os._exit,
            9,
            "bench: the process of _exit was killed, as where memory runs out; measure something",
        ),
    ],
)
def test_a_process_that_fails_or_is_killed_is_one_line(call, argument, message):
    with pytest.raises(UserError, match=message):
        in_a_process(call, argument)


def test_both_attentions_train_the_same_model():
    step = Step(settings())
    losses = {name: step(name) for name in ("plain", "ours")}
    assert losses["plain"] == pytest.approx(losses["ours"], rel=1e-5)
    with model_attention("plain"):
        pass
    before = torch.ops.dynllava.masked_softmax.default
    assert before is not None and step("ours") == losses["ours"]


def test_keep_rates_are_the_papers():
    generator = torch.Generator().manual_seed(0)
    keep = training_keep(64, 2048, "paper", generator)
    assert keep[:, :35].all() and keep[:, 611:1329].all()
    assert float(keep[:, 35:611].mean()) == pytest.approx(0.2, abs=0.01)
    assert float(keep[:, 1330:].mean()) == pytest.approx(0.5, abs=0.01)
    step = Step(settings(batch=4, text=64))
    step.model.gumbel_tau = 1.0
    out = step.model(**step.batch)
    assert float(out.image_keep.float().mean()) == pytest.approx(0.2, abs=0.05)
    assert float(out.text_keep.float().mean()) == pytest.approx(0.5, abs=0.2)


def test_flops_are_six_a_weight_and_token_and_the_attentions_pairs():
    step = settings()
    weights = 3 * TINY.layer_parameters + 32 * 64
    pairs = 592 * 593 / 2
    predictors = 576 * TINY.image_predictor_parameters + 8 * TINY.text_predictor_parameters
    assert step.flops == pytest.approx(6 * (592 * weights + predictors) + 3 * 4 * 32 * 3 * pairs)
    assert epoch_hours(2.0, 10) == pytest.approx(665_000 / 20 / 3600)
    assert peak_flops(torch.device("cpu"), torch.float32, 3.0) == (3e12, "--peak-tflops")
    measured, source = peak_flops(torch.device("cpu"), torch.float32, None)
    assert measured > 1e8 and "timed here" in source
