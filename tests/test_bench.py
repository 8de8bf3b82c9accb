"""The benchmark: every phase runs, rows are what they say, bad input is one line before anything is allocated."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
from PIL import Image

from dynllava_plugin.bench import loading, measuring, plots, timing
from dynllava_plugin.bench.command import PHASES, main
from dynllava_plugin.bench.modes import MODES, context_in, modes_named
from dynllava_plugin.bench.never_slower import never_slower
from dynllava_plugin.bench.paper import paper_figures
from dynllava_plugin.bench.report import markdown
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.shapes import shape_named
from dynllava_plugin.bench.subject import Subject
from dynllava_plugin.cli import main as dynllava
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape, cache_bytes
from tests.families.checkpoints import write_checkpoint

TINY = [
    "--shape",
    "4x256x4",
    "--image-tokens",
    "16",
    "--text-tokens",
    "8",
    "--repeats",
    "1",
    "--warmup",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setattr("dynllava_plugin.bench.shapes.VOCABULARY", 300)


@pytest.fixture(scope="module")
def subject():
    shape = DecoderShape(4, 64, 128, 4, 4, 300, predictor_dim=16, predictor_ffn_dim=32)
    return Subject(shape, torch.device("cpu"), torch.float32, 16, 8, 0.25, 0.5)


def in_this_process(call, *arguments):
    """What a child process does, without another import of PyTorch."""
    return call(*arguments)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Rows and folder of `bench all`."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynllava_plugin.bench.shapes.VOCABULARY", 300)
        patch.setattr("dynllava_plugin.bench.score.ANSWER", 6)
        patch.setattr(loading, "in_a_process", in_this_process)
        arguments = [
            "all",
            *TINY,
            "--batch",
            "1,3",
            "--at",
            "0,30",
            "--path",
            "eager,static",
            "--output",
            str(folder),
        ]
        assert dynllava(["bench", *arguments]) == 0
    return json.loads((folder / "rows.json").read_text()), folder


def test_every_phase_and_mode_has_its_rows(everything):
    rows, _ = everything
    found = {(row["phase"], row["mode"]) for row in rows}
    assert found >= {(phase, mode) for phase in PHASES for mode in MODES if phase != "load"}
    assert {row["path"] for row in rows if row["phase"] == "load"} == {"cold", "warm"}
    for phase in ("prefill", "decode"):
        assert {row["path"] for row in rows if row["phase"] == phase} == {"eager", "static"}
    for row in rows:
        assert row["shape"] == "4x256x4" and row["device"] == "cpu" and row["image_tokens"] == 16
        if row["phase"] != "memory":
            assert row["median_s"] > 0 and row["min_s"] <= row["median_s"] <= row["max_s"]
        if row["mode"] == "full" and "ideal_speedup" in row:
            assert row["speedup"] == row["ideal_speedup"] == 1
        elif "ideal_speedup" in row:
            assert row["ideal_speedup"] > 1 and row["of_ideal"] == pytest.approx(
                row["speedup"] / row["ideal_speedup"]
            )


def test_cache_bytes_are_what_the_kept_tokens_need_and_a_growth_step(everything):
    rows, _ = everything
    for row in [row for row in rows if row["phase"] in ("decode", "memory")]:
        slack = 1.3 if row["batch"] > 1 else 1.0  # few tokens: samples of a batch differ by much
        assert (
            row["needed_bytes"]
            <= row["cache_bytes"]
            <= slack * row["needed_bytes"] + row["growth_bytes"] * 1.1
        )
    decode = {(r["mode"], r["batch"], r["length"], r["path"]): r for r in rows if r["phase"] == "decode"}
    assert (
        decode["image_text", 1, 30, "eager"]["needed_bytes"] < decode["image", 1, 30, "eager"]["needed_bytes"]
    )
    assert decode["image", 1, 30, "eager"]["needed_bytes"] < decode["full", 1, 30, "eager"]["needed_bytes"]


def test_flops_of_decoding_fall_with_the_context(everything):
    rows = {
        (r["mode"], r["length"]): r["tflops_exact"]
        for r in everything[0]
        if r["phase"] == "decode" and r["batch"] == 1
    }
    for length in {length for _, length in rows}:
        assert (
            rows["image_text", length] < rows["full", length]
            and rows["full", length] > rows["full", 0] * 0.99
        )


def test_one_pass_and_token_by_token_scores_agree(everything):
    scores = [row for row in everything[0] if row["phase"] == "score"]
    assert scores and all(row["max_difference"] < 1e-4 for row in scores)


def test_report(everything):
    rows, folder = everything
    table = pd.read_csv(folder / "table.csv")
    assert len(table) == len(rows) and {"phase", "mode", "batch", "length", "median_s", "speedup"} <= set(
        table
    )
    text = (folder / "table.md").read_text()
    assert (
        "As Table 4: 4x256x4 on cpu" in text
        and "As Table 14" in text
        and "126.9" not in text
        and "124.5" in text
    )
    assert (folder / "4x256x4_cpu_float32_batch3.png").stat().st_size > 10_000
    assert json.loads((folder / "machine.json").read_text())["cpu"]["host"]["cores"]


def test_what_is_never_slower_is_told_for_every_batch_size(everything):
    rows = [dict(row) for row in everything[0]]
    for row in rows:
        row.update(speedup=2.0 if row["path"] == "eager" else 3.0, of_ideal=0.5)
    text = never_slower([*rows, *({**row, "device": "GPU X"} for row in rows if row["phase"] == "prefill")])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    found = {tuple(line[:4]): line[4:] for line in lines[2:]}
    assert lines[0][4:] == [f"batch {batch}" for batch in (1, 4, 8, 16, 32)]
    assert found["cpu", "4x256x4", "decode", "fastv"] == ["2.00 (0.50)", *["not measured"] * 4]
    assert found["GPU X", "4x256x4", "prefill", "image"][0] == "3.00 (0.50)"  # captured
    assert found["GPU X", "4x256x4", "decode", "image"] == ["not measured"] * 5
    assert found["a CUDA GPU", "llava-1.5-13b", "prefill", "image_text"] == ["not measured"] * 5
    assert text in markdown(
        [*rows, *({**row, "device": "GPU X"} for row in rows if row["phase"] == "prefill")]
    )


def test_a_report_over_several_files(everything, tmp_path, capsys):
    rows, folder = everything
    other = tmp_path / "gpu.json"
    other.write_text(json.dumps([{**row, "device": "GPU X"} for row in rows if row["phase"] == "prefill"]))
    assert main(["report", str(folder / "rows.json"), str(other), "--output", str(tmp_path / "both")]) == 0
    assert set(pd.read_csv(tmp_path / "both" / "table.csv")["device"]) == {"cpu", "GPU X"}
    assert set(json.loads((tmp_path / "both" / "machine.json").read_text())) == {"cpu", "GPU X"}
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json: can't be read" in capsys.readouterr().err


def test_paper_figures_are_the_published_ones():
    figures = paper_figures()
    assert figures["4", "LLaVA-1.5", "prefill_s"] == 0.83
    assert figures["14", "Dynamic-LLaVA_I|T", "decode_ms_per_token"] == 26.85
    assert ("4", "LLaVA-1.5", "cache_4K_gib") not in figures  # did not fit


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_calibration_keeps_exactly_the_asked_share(subject, batch, share):
    subject.text_keep_rate = share
    subject.switch("image_text")
    prompts = subject.prompts(batch, 40, mixed=batch > 1)
    kept = prompts.calibrate()
    assert kept == pytest.approx(share, abs=0.02)
    cache = subject.model.new_cache()
    with torch.inference_mode():
        prompts.prefill(cache)
        prompts.feed(cache, 0, 20)
        for column in range(20, 40):
            prompts.step(cache, column)
    assert float(cache.output_keep().float().mean()) == pytest.approx(kept, abs=1e-6)
    context = subject.context("image_text")
    if not prompts.mixed:
        need = cache_bytes(subject.shape, context, 40, 4, batch)
        assert int(cache.kept_lengths().sum()) * subject.shape.kv_bytes(4) == pytest.approx(need, rel=0.01)


def test_an_interrupted_run_keeps_its_rows_and_goes_on(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    arguments = ["prefill", *TINY, "--batch", "1,2", "--mode", "image", "--json", str(file)]
    measured = []
    real = timing.interleaved

    def second_is_interrupted(*args, **kwargs):
        measured.append(args)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("dynllava_plugin.bench.run.interleaved", second_is_interrupted)
    assert main(arguments) == 130
    first = json.loads(file.read_text())
    assert [(row["mode"], row["batch"]) for row in first] == [("full", 1), ("image", 1)]
    assert main([*arguments, "--resume"]) == 0
    rows = json.loads(file.read_text())
    assert len(measured) == 3 and rows[:2] == first and len(rows) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--shape", "400x65536x64"],
            r"--shape 400x65536x64: needs about \d+\.\d GiB, cpu has \d+\.\d GiB free",
        ),
        (["--new-tokens", "0"], "--new-tokens: 0 is less than 1"),
        (["--new-tokens", "-5"], "--new-tokens: -5 is less than 1"),
        (["--batch", "0"], "--batch: .0. must be numbers of at least 1"),
        (["--batch", "-1"], "--batch: '-1' must be numbers of at least 1"),
        (["--batch", "two"], "--batch: 'two' is not a comma-separated list"),
        (["--at", "-3"], "--at: '-3' must be numbers of at least 0"),
        (["--image-tokens", "0"], "--image-tokens: 0 is less than 1"),
        (["--vision-keep-rate", "0"], "--vision-keep-rate: 0.0 is outside"),
        (["--vision-keep-rate", "0.01"], "--vision-keep-rate: 0.01 keeps none of 16 image tokens"),
        (["--text-keep-rate", "0"], "--text-keep-rate: 0.0 is outside"),
        (["--text-keep-rate", "0.001"], "--text-keep-rate: 0.001 keeps none of"),
        (["--shape", "huge"], "--shape: 'huge' is neither"),
        (["--shape", "2x256x4"], "--shape: 2x256x4 needs at least 3 layers"),
        (["--shape", "4x256x3"], "--shape: width 256 must be divisible"),
        (["--mode", "half"], "--mode half: policy: unknown value .half."),
        (["--path", "fast"], "--path: fast; choose from eager"),
        (["--dtype", "int8"], "--dtype: 'int8' is not one of"),
        (["--device", "tpu"], "device: 'tpu' is not a device"),
        (["--repeats", "0"], "--repeats: 0 is less than 1"),
        (["--repeats", "x"], "--repeats: 'x' is not a whole number"),
        (["--warmup", "-1"], "--warmup: -1 is less than 0"),
        (["--device", "meta"], "--device: 'meta'; the benchmark knows cpu and cuda"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, message):
    assert main(["decode", *TINY, "--new-tokens", "5", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(capsys):
    assert main(["prefill", *TINY, "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err


def test_what_can_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(measuring, "Subject", lambda *args, **kwargs: pytest.fail("allocated"))
    assert main(["prefill", "--shape", "200x32768x64", "--device", "cpu"]) == 2


def test_memory_reports_a_mode_that_does_not_fit(monkeypatch, tmp_path):
    """Between what I|T and what full context needs: the one is measured, the other a row that says so."""
    file = tmp_path / "rows.json"
    full, less = (_needed(mode) for mode in ("full", "image_text"))
    monkeypatch.setattr("dynllava_plugin.bench.memory.free_bytes", lambda device: (full + less) // 2)
    arguments = [
        "memory",
        *TINY,
        "--batch",
        "2",
        "--at",
        "0,2000",
        "--mode",
        "image_text",
        "--json",
        str(file),
    ]
    assert main(arguments) == 0
    fits = {(row["mode"], row["length"]): row["fits"] for row in json.loads(file.read_text())}
    assert fits == {
        ("full", 0): True, ("full", 2000): False, ("image_text", 0): True, ("image_text", 2000): True,
    }  # fmt: skip


def _needed(mode):
    from dynllava_plugin.bench.memory import STEPS
    from dynllava_plugin.bench.subject import working_bytes

    shape = shape_named("4x256x4")
    context = context_in(mode, shape.layers, 16, 8, 0.2, 0.5)
    return int(working_bytes(shape, [context], 2, 2000 + STEPS, 4))


def test_rows_of_another_machine_are_not_gone_on_from(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["prefill", *TINY, "--mode", "image", "--json", str(file)]
    assert main(arguments) == 0
    rows, description = file.read_text(), tmp_path / "rows.machine.json"
    there = json.loads(description.read_text())
    there["host"]["processor"] = "Abacus"
    description.write_text(json.dumps(there))
    assert main([*arguments, "--resume"]) == 2
    assert "measured on another machine (processor Abacus, here " in capsys.readouterr().err
    assert file.read_text() == rows and "Abacus" in description.read_text()
    assert main(arguments) == 0 and "Abacus" not in description.read_text()
    file.unlink()  # a description without rows is of nothing
    description.write_text(json.dumps(there))
    assert main([*arguments, "--resume"]) == 0 and "Abacus" not in description.read_text()


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    file = tmp_path / "rows.json"
    file.write_text('{"a": 1}')
    for more in ([], ["--resume"]):
        assert main(["prefill", *TINY, "--json", str(file), *more]) == 2
        assert "not a list of benchmark rows" in capsys.readouterr().err
    assert file.read_text() == '{"a": 1}'


@pytest.mark.parametrize("phase", ["all", "load", "serve", "train", "harness"])
def test_a_place_that_takes_no_rows_is_one_line_before_any_work(phase, tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "rows.json"):
        assert main([phase, "--json", str(place)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --json {place}: ") and error.count("\n") == 1


def test_policies_by_chance_run_in_every_phase():
    """Their seeds come from the pixels: features are encoded under the policy that is in force."""
    arguments = ["all", *TINY, "--only", "prefill,decode,nocache,score", "--batch", "2", "--at", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynllava_plugin.bench.score.ANSWER", 4)
        assert main([*arguments, "--mode", "random"]) == 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(64, 48), (40, 90)]):
        Image.new("RGB", size, (40 * number, 90, 200)).save(folder / f"{number}.png")
    return folder


def test_a_checkpoint_is_asked_about_pictures(pictures, tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = [
        "all",
        "--pretrained",
        "tiny",
        "--images",
        str(pictures),
        "--device",
        "cpu",
        "--json",
        str(file),
    ]
    arguments += ["--only", "prefill,decode,nocache,score,memory", "--batch", "2", "--at", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynllava_plugin.bench.score.ANSWER", 4)
        assert main([*arguments, "--repeats", "1", "--warmup", "0", "--mode", "random"]) == 0
    rows = json.loads(file.read_text())
    assert {row["phase"] for row in rows} == {"prefill", "decode", "nocache", "score", "memory"}
    assert {row["mode"] for row in rows} == {"full", "random"}
    assert all(row["shape"] == "tiny" and row["image_tokens"] == 64 for row in rows)
    (full,) = (row for row in rows if row["phase"] == "memory" and row["mode"] == "full")
    held = full["needed_bytes"] / (2 * 6 * 2 * 192 * 4)  # samples, layers, keys and values, width, float32
    assert held == 64 + full["text_tokens"] + 1
    assert main(["prefill", *arguments[1:7], "--batch", "1", "--mode", "image", "--repeats", "1"]) == 0
    assert "tiny has no predictors" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_a_checkpoint_of_another_family(family, pictures, tmp_path):
    """Images of other sizes have other numbers of tokens: the batch is padded."""
    folder = str(write_checkpoint(family, tmp_path / family))
    arguments = [
        "prefill",
        "--pretrained",
        folder,
        "--images",
        str(pictures),
        "--device",
        "cpu",
        "--repeats",
        "1",
    ]
    assert (
        main([*arguments, "--batch", "2", "--mode", "fastv,k=2", "--json", str(tmp_path / "rows.json")]) == 0
    )


def test_pictures_that_are_not_there_are_one_line(tmp_path, capsys):
    for flags, message in (
        (["--pretrained", "tiny"], "--pretrained: goes with --images DIR"),
        (["--images", str(tmp_path)], "--pretrained: goes with --images DIR"),
        (["--pretrained", "tiny", "--images", str(tmp_path)], f"--images {tmp_path}: no picture in it"),
        (["--pretrained", "tiny", "--images", str(tmp_path), "--shape", "7b"], "without --shape"),
    ):
        assert main(["prefill", "--device", "cpu", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_rows_replace_older_ones_about_the_same():
    rows = Rows(None, False, {"shape": "x"})
    rows.add(phase="prefill", mode="full", batch=1, length=0, median_s=1.0)
    rows.add(phase="prefill", mode="full", batch=1, length=0, median_s=2.0)
    rows.add(phase="prefill", mode="full", batch=2, length=0, median_s=3.0)
    assert [row["median_s"] for row in rows.rows] == [2.0, 3.0]
    assert rows.has([{"phase": "prefill", "mode": "full", "batch": 2}])
    assert not rows.has([{"phase": "prefill", "mode": "image", "batch": 2}])


def test_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.interleaved(calls, torch.device("cpu"), repeats=2, warmup=1)
    assert "".join(order) == "cab" + "abc" + "bca" and all(len(values) == 2 for values in times.values())


def test_full_context_is_always_there_to_compare_with():
    assert modes_named("--mode", "image_text") == ["full", "image_text"]
    with pytest.raises(UserError):
        modes_named("--mode", "")


def test_a_list_of_modes_may_name_policies():
    modes = modes_named(
        "--mode", "image_text,h2o,r=0.5,downsample,schedule,2:fastv:0.5,3:random:0.3,fastv+h2o,fastv.r=0.5"
    )
    assert modes == [
        "full", "image_text", "h2o,r=0.5", "downsample", "schedule,2:fastv:0.5,3:random:0.3", "fastv+h2o,fastv.r=0.5",
    ]  # fmt: skip
    for wrong, why in (("visionzip", "dynllava compare"), ("h2o,r=2", "r=2"), ("half", "choose one of")):
        with pytest.raises(UserError, match=f"--mode {wrong}: .*{why}"):
            modes_named("--mode", wrong)


@pytest.mark.parametrize(
    "policy", ["full", "image", "image_text", "fastv", "random", "downsample", "divprune", "h2o,r=0.5",
               "fastv+h2o,fastv.r=0.5,h2o.r=0.25", "image+structure", "pyramiddrop", "sparsevlm", "v2drop,ratio=0.6", "dart",
               "snapkv", "pyramidkv", "schedule,1:fastv:0.5,3:random:0.3", "schedule,0:divprune:0.5,2:image:0.3"]
)  # fmt: skip
@torch.inference_mode()
def test_a_policys_context_is_what_its_cache_holds(subject, policy):
    subject.text_keep_rate = 0.5
    prompts = subject.prompts(2, 40)
    prompts.calibrate()
    subject.switch(policy)
    cache = subject.model.new_cache()
    prompts.prefill(cache)
    for length in (0, 40):
        prompts.feed(cache, 0, length)
        counted = cache_bytes(subject.shape, subject.context(policy), length, subject.itemsize, 2)
        held = int(cache.kept_lengths().sum()) * subject.shape.kv_bytes(subject.itemsize)
        assert held == pytest.approx(counted, rel=0.02)


def test_markdown_of_no_rows_is_a_heading():
    assert markdown([]).startswith("# Measured")


def test_no_line_of_a_chart_is_cut_off(tmp_path, monkeypatch):
    """The axis once ended above the first line, and those of the other modes left the picture."""
    drawn = []
    monkeypatch.setattr(plots, "write_figure", lambda path, figure, dpi: drawn.append(figure))
    about = {
        "shape": "s",
        "device": "cpu",
        "dtype": "float32",
        "batch": 1,
        "path": "eager",
        "phase": "decode",
    }
    rows = [
        {**about, "mode": mode, "length": length, "median_s": seconds}
        for mode, seconds in (("full", 0.04), ("image", 0.1))
        for length in (0, 500)
    ]
    plots.draw(pd.DataFrame(rows), tmp_path)
    (axis,) = drawn[0].axes
    low, high = axis.get_ylim()
    assert low == 0 and len(axis.lines) == 2
    assert all(line.get_ydata().max() <= high for line in axis.lines)
