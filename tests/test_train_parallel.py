"""Two processes on the CPU: the losses and weights of one process with the same global batch."""

from __future__ import annotations

import csv
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.families.checkpoints import write_checkpoint
from tests.processes import (
    Job,
    allow_deepspeed_on_cpu,
    allow_fsdp_on_cpu,
    kill_in_step,
    run,
    side_by_side,
)
from tests.training_kit import save_checkpoint, save_mixture

RECIPE = "--global_batch_size 4 --max_steps 4 --learning_rate 1e-3 --predictor_learning_rate 1e-3"
COMPARED = (
    "loss",
    "lm_loss",
    "image_keep_loss",
    "text_keep_loss",
    "image_keep_rate",
    "text_keep_rate",
    "tau",
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("parallel")
    mixture, images = save_mixture(folder / "data", samples=10)
    checkpoint = save_checkpoint(folder / "checkpoint")
    return [
        *("--model_name_or_path", str(checkpoint), "--data_path", str(mixture)),
        *("--image_folder", str(images), "--data_cache", str(folder / "cache")),
        *("--logging_steps", "1", "--report_to", "none", "--dataloader_num_workers", "0"),
        *("--held_out", "3", "--eval_steps", "2"),
        *RECIPE.split(),
    ]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """One process, the whole global batch at once."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    one = [*flags, "--use_cpu", "--per_device_train_batch_size", "4", "--output_dir", str(folder)]
    (done,) = run(Job(one, folder.with_suffix(".log")))
    assert done.status == 0, done.output
    return folder


def log(folder: Path, name: str = "train_log.csv") -> list[dict[str, float]]:
    with (folder / name).open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def two(flags: list[str], folder: Path, *more: str, **environment: Any) -> None:
    """Two processes of half a global batch each."""
    both = [*flags, "--per_device_train_batch_size", "2", "--output_dir", str(folder), *more]
    done = run(*side_by_side(both, folder.with_suffix(".log"), 2, **environment))
    assert [one.status for one in done] == [0, 0], "\n".join(one.output for one in done)
    assert "global batch 4 = 2 x 2 processes x 1 accumulated" in done[0].output


def assert_the_same(folder: Path, reference: Path) -> None:
    rows, expected = log(folder), log(reference)
    assert len(rows) == len(expected) == 4
    for row, other in zip(rows, expected, strict=True):
        for name in COMPARED:
            assert row.get(name) == pytest.approx(other.get(name), rel=1e-4, abs=1e-4), (row["step"], name)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for row, other in zip(log(folder, "eval_log.csv"), log(reference, "eval_log.csv"), strict=True):
        for name in ("step", "eval_accuracy", "eval_kept_image_share", "eval_samples"):
            assert row[name] == other[name], name
        assert row["eval_ppl"] == pytest.approx(other["eval_ppl"], rel=1e-3)
    weights, others = load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-4, msg=name)


def stop_half_way(folder: Path) -> None:
    """Leave of a finished run what it had behind its second step."""
    shutil.rmtree(folder / "checkpoint-4")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "finished": False}))


def test_ddp_killed_within_an_epoch_goes_on_in_two_processes_or_one(flags, alone, tmp_path):
    """An epoch has two steps."""
    folder = tmp_path / "out"
    typed = [*flags, "--use_cpu", "--save_steps", "3", "--per_device_train_batch_size", "2"]
    kill = partial(kill_in_step, 4, "backward")
    killed = run(*side_by_side([*typed, "--output_dir", str(folder)], tmp_path / "killed.log", 2, kill))
    assert [one.status for one in killed] == [-9, -9], "\n".join(one.output for one in killed)
    two(flags, folder, "--use_cpu", "--save_steps", "3")
    assert f"going on from {folder / 'checkpoint-3'}" in (tmp_path / "out.log-0").read_text()
    assert_the_same(folder, alone)
    stop_half_way(folder)
    one = [*flags, "--use_cpu", "--per_device_train_batch_size", "4", "--output_dir", str(folder)]
    (done,) = run(Job(one, tmp_path / "one.log"))
    assert done.status == 0 and f"going on from {folder / 'checkpoint-3'}" in done.output, done.output
    assert_the_same(folder, alone)


def test_image_mode_under_ddp_waits_for_no_predictor_that_never_runs(flags, tmp_path):
    more = ["--mode", "image", "--max_steps", "2", "--gradient_checkpointing", "true", "--held_out", "0"]
    two(flags, tmp_path / "out", "--use_cpu", *more)
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(flags[1]), tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("image_predictor" in name for name in moved)
    assert not [name for name in moved if "text_predictor" in name]


def test_what_one_process_finds_ends_all(flags, tmp_path):
    """Only one process of a node lists the images."""
    flags = [*flags, "--image_folder", str(tmp_path), "--per_device_train_batch_size", "2", "--use_cpu"]
    done = run(*side_by_side([*flags, "--output_dir", str(tmp_path / "out")], tmp_path / "log", 2))
    assert [one.status for one in done] == [2, 2], "\n".join(one.output for one in done)
    assert "0.png is missing (10 of 10 in .)" in done[0].output and "error" not in done[1].output


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def test_fsdp2(flags, alone, tmp_path):
    more = ["--use_cpu", "--save_steps", "2", "--max_grad_norm", "1e6"]  # nothing is clipped
    two(flags, tmp_path / "out", *more, before=allow_fsdp_on_cpu, **FSDP2)
    assert_the_same(tmp_path / "out", alone)
    stop_half_way(tmp_path / "out")
    two(flags, tmp_path / "out", *more, before=allow_fsdp_on_cpu, **FSDP2)
    assert "going on from" in (tmp_path / "out.log-0").read_text()
    assert_the_same(tmp_path / "out", alone)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["sharding"] == "FSDP"


def test_fsdp2_in_bfloat16_rounds_neither_noise_nor_losses(flags, tmp_path):
    """accelerate's own policy casts a module's inputs and outputs, so the Gumbel noise and the losses, to bfloat16."""
    flags = [*flags, "--held_out", "0", "--bf16", "true", "--save_strategy", "no"]
    one = [*flags, "--use_cpu", "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "one")]
    (done,) = run(Job(one, tmp_path / "one.log"))
    assert done.status == 0, done.output
    two(flags, tmp_path / "two", "--use_cpu", before=allow_fsdp_on_cpu, **FSDP2)
    for row, other in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=5e-3), row["step"]
        total = row["lm_loss"] + 100 * (row["image_keep_loss"] + row["text_keep_loss"])
        assert row["loss"] == pytest.approx(total, rel=1e-4)  # float32 sums


def test_another_family_under_ddp_and_fsdp2(tmp_path):
    """Half of the samples have no image: a process whose batch has none must not keep the other waiting."""
    mixture, images = save_mixture(tmp_path / "data", samples=4)
    rows = json.loads(mixture.read_text())
    mixture.write_text(json.dumps(rows[:4] + rows[4:] * 4))
    flags = [
        *("--model_name_or_path", str(write_checkpoint("qwen2_5_vl", tmp_path / "checkpoint"))),
        "--use_cpu",
    ]
    flags += ["--data_path", str(mixture), "--image_folder", str(images), "--text_only", "true"]
    flags += ["--data_cache", str(tmp_path / "cache"), "--logging_steps", "1", "--report_to", "none"]
    flags += ["--dataloader_num_workers", "0", "--save_strategy", "no", *RECIPE.split()]
    (done,) = run(
        Job(
            [*flags, *f"--output_dir {tmp_path / 'one'}".split(), *"--per_device_train_batch_size 2".split()],
            tmp_path / "one.log",
        )
    )
    assert done.status == 0, done.output
    for name, before, environment in (("ddp", None, {}), ("fsdp2", allow_fsdp_on_cpu, FSDP2)):
        both = [*flags, "--per_device_train_batch_size", "1", "--output_dir", str(tmp_path / name)]
        more = {"before": before} if before else {}
        done = run(*side_by_side(both, tmp_path / f"{name}.log", 2, **more, **environment))
        assert [one.status for one in done] == [0, 0], "\n".join(one.output for one in done)
        for row, other in zip(log(tmp_path / name), log(tmp_path / "one"), strict=True):
            for column in COMPARED:
                assert row.get(column) == pytest.approx(other.get(column), rel=1e-4, abs=1e-4), column


def deepspeed(folder: Path, stage: int) -> str:
    """A DeepSpeed configuration file of `stage`, as accelerate's config would make it."""
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, "overlap_comm": False}
    settings = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }
    settings |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    settings |= {"zero_allow_untested_optimizer": True}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(flags, alone, tmp_path, stage):
    settings = ["--deepspeed", deepspeed(tmp_path, stage), "--max_grad_norm", "1e6"]  # nothing is clipped
    two(flags, tmp_path / "out", *settings, before=allow_deepspeed_on_cpu, DS_ACCELERATOR="cpu")
    assert_the_same(tmp_path / "out", alone)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["sharding"] == f"DeepSpeed ZeRO-{stage} with 2 process(es)"
