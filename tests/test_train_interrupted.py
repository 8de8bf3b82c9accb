"""Runs that are killed, stopped, out of disk or out of luck, and go on with the same command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dynllava_plugin import DynamicLlavaForConditionalGeneration
from dynllava_plugin.errors import UserError
from tests import processes
from tests.processes import Job, run
from tests.property_tests import examples
from tests.training_kit import save_checkpoint, save_mixture
from train import checkpoints
from train.data import ConversationDataset
from train.finetune import main
from train.run_record import RunRecord
from train.skipped import SkippedSamples

RECIPE = "--global_batch_size 4 --per_device_train_batch_size 2 --max_steps 6 --save_steps 2"
RATES = "--learning_rate 1e-3 --predictor_learning_rate 1e-3 --neftune_noise_alpha 1"


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("interrupted")
    mixture, images = save_mixture(folder / "data", samples=11)
    checkpoint = save_checkpoint(folder / "checkpoint")
    return [
        *("--model_name_or_path", str(checkpoint), "--data_path", str(mixture)),
        *("--image_folder", str(images), "--data_cache", str(folder / "cache"), "--use_cpu"),
        *("--logging_steps", "1", "--report_to", "none", "--dataloader_num_workers", "0"),
        *RECIPE.split(),
        *RATES.split(),
    ]


def command(flags: list[str], folder: Path, *more: str) -> list[str]:
    return [*flags, "--output_dir", str(folder), *more]


def job(flags: list[str], folder: Path, before=None, *arguments) -> Job:
    return Job(command(flags, folder), folder.with_suffix(".log"), before=before, arguments=arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory) -> tuple[Path, int]:
    """A run's folder, and how many changes to files it made."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    count = folder.with_suffix(".count")
    (done,) = run(job(flags, folder, processes.kill_at_event, str(folder), 0, str(count)))
    assert done.status == 0, done.output
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    return folder, int(count.read_text())


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(flags, uninterrupted, tmp_path):
    """In a step's passes, as weights change, while a checkpoint and while the model is saved."""
    reference, folder = uninterrupted[0], tmp_path / "out"
    kills = [
        (processes.kill_in_step, (1, "forward"), []),
        (processes.kill_in_step, (3, "update"), ["checkpoint-2"]),
        (processes.kill_behind, (str(folder / checkpoints.SAVING / "checkpoint-4"),), ["checkpoint-2"]),
        (processes.kill_in_step, (5, "backward"), ["checkpoint-2", "checkpoint-4"]),
        (processes.kill_behind, (str(folder / ".model"),), ["checkpoint-4", "checkpoint-6"]),
    ]
    for before, arguments, there in kills:
        (done,) = run(job(flags, folder, before, *arguments))
        assert done.status == -signal.SIGKILL, done.output
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == there, arguments
    (done,) = run(job(flags, folder))
    assert done.status == 0, done.output
    assert same(weights(reference), weights(folder))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    steps = [line.split(",")[0] for line in (folder / "train_log.csv").read_text().splitlines()]
    assert steps == ["step", "1", "2", "3", "4", "5", "6"]


@pytest.fixture(scope="module")
def half_way(flags, tmp_path_factory) -> Path:
    """A run killed right behind its second checkpoint."""
    folder = tmp_path_factory.mktemp("half") / "out"
    (done,) = run(job(flags, folder, processes.kill_behind, str(folder / "checkpoint-4")))
    assert done.status == -signal.SIGKILL
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    return folder


def test_a_checkpoint_cut_short_is_passed_over(flags, uninterrupted, half_way, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(half_way, folder)
    damaged = folder / "checkpoint-4" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    (done,) = run(job(flags, folder))
    assert done.status == 0, done.output
    assert "checkpoint-4: not used" in done.output and "optimizer.pt" in done.output
    assert "going on from" in done.output and "checkpoint-2\n" in done.output
    assert same(weights(uninterrupted[0]), weights(folder))


@examples(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_any_file_is_noticed(half_way, tmp_path, data):
    files = sorted(path.name for path in (half_way / "checkpoint-4").iterdir())
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(half_way, folder)
    assert checkpoints.last_whole(folder) == (folder / "checkpoint-4", [])
    damaged = folder / "checkpoint-4" / data.draw(st.sampled_from(files))
    content = damaged.read_bytes()
    length = data.draw(st.integers(0, len(content)))
    if length == len(content):  # no byte is missing, one is another
        place = data.draw(st.integers(0, length - 1))
        changed = content[place] ^ data.draw(st.integers(1, 255))
        damaged.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
        if damaged.name == "manifest.json":
            return  # a text of the same meaning, or none at all
    elif length:
        damaged.write_bytes(content[:length])
    else:
        damaged.unlink()
    whole, notes = checkpoints.last_whole(folder)
    if damaged.name == "manifest.json" and length == len(content) - 1:  # its line break
        assert whole == folder / "checkpoint-4"
    else:
        assert whole == folder / "checkpoint-2" and len(notes) == 1 and damaged.name in notes[0]


def test_sigterm_saves_and_the_same_command_goes_on(flags, uninterrupted, tmp_path):
    folder = tmp_path / "out"
    (done,) = run(job(flags, folder, processes.terminate_in_step, 3))
    assert done.status == 128 + signal.SIGTERM
    # The step it came in was counted before, the next one is the last.
    assert "stopped by SIGTERM after step 4" in done.output and not (folder / "config.json").exists()
    assert "Traceback" not in done.output
    (done,) = run(job(flags, folder))
    assert done.status == 0 and "checkpoint-4\n" in done.output
    assert same(weights(uninterrupted[0]), weights(folder))


def test_sigterm_saves_before_it_would_evaluate(flags, tmp_path):
    """Seconds may be left, and an evaluation takes minutes."""
    folder = tmp_path / "out"
    stopped = job([*flags, "--held_out", "2", "--eval_steps", "4"], folder, processes.terminate_in_step, 3)
    (done,) = run(stopped)
    assert done.status == 128 + signal.SIGTERM and (folder / "checkpoint-4").is_dir()
    assert len((folder / "eval_log.csv").read_text().splitlines()) == 1


def test_sigterm_to_the_whole_group_leaves_the_workers_to_their_rank(flags, uninterrupted, tmp_path):
    """As launchers and schedulers send it; a worker that died of it would take its rank with it."""
    folder = tmp_path / "out"
    stopped = job(flags, folder, processes.terminate_group_in_step, 3)
    stopped.flags += ["--dataloader_num_workers", "1"]
    (done,) = run(stopped)
    assert done.status == 128 + signal.SIGTERM, done.output
    assert "stopped by SIGTERM after step" in done.output and "Traceback" not in done.output
    assert main(command(flags, folder)) == 0
    assert same(weights(uninterrupted[0]), weights(folder))


def test_killed_at_any_of_the_last_changes_the_same_command_goes_on(flags, tmp_path):
    """The model is in place, but run.json doesn't say yet that the run has finished."""
    short = [*flags, "--max_steps", "1", "--save_strategy", "no"]
    counting = job(short, tmp_path / "whole", processes.kill_at_event, str(tmp_path / "whole"), 0)
    counting.arguments += (str(tmp_path / "count"),)
    (done,) = run(counting)
    assert done.status == 0, done.output
    changes = int((tmp_path / "count").read_text())
    folders = {back: tmp_path / f"back{back}" for back in range(3)}
    jobs = [
        job(short, folder, processes.kill_at_event, str(folder), changes - back, str(tmp_path / f"n{back}"))
        for back, folder in folders.items()
    ]
    assert [done.status for done in run(*jobs)] == [-signal.SIGKILL] * 3
    assert all((folder / "config.json").exists() for folder in folders.values())
    for folder in folders.values():
        assert main(command(short, folder)) == 0
        assert json.loads((folder / "run.json").read_text())["finished"]
        assert same(weights(tmp_path / "whole"), weights(folder))


def sealed(folder: Path, step: int) -> Path:
    """An empty checkpoint that counts as whole."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    checkpoints.seal(checkpoint)
    return checkpoint


@pytest.mark.parametrize("keep", [1, 2, 4, None])
def test_as_many_checkpoints_stay_as_asked(tmp_path, keep):
    for step in range(1, 7):
        checkpoints.publish(sealed(tmp_path / ".saving", step), tmp_path, keep)
        there = [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)]
        assert there == list(range(1, step + 1))[-(keep or step) :]


@pytest.mark.parametrize("limit", [None, 50_000])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(flags, uninterrupted, tmp_path, limit):
    folder = tmp_path / "out"
    (done,) = run(job(flags, folder, processes.fill_disk_at, 4, limit))
    assert done.status == 2, done.output
    (error,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert "checkpoint-4 could not be saved" in error and "GB are free there" in error
    assert f"{folder / 'checkpoint-2'} is whole" in error
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / ".saving").exists()
    if limit is None:
        (done,) = run(job(flags, folder))
        assert done.status == 0 and "checkpoint-2\n" in done.output
        assert same(weights(uninterrupted[0]), weights(folder))


def test_a_finished_run_is_left_alone_and_another_one_is_not_mixed_in(flags, half_way, tmp_path, capsys):
    short = [*flags, "--max_steps", "2", "--output_dir", str(tmp_path / "short")]
    assert main(short) == 0
    before = (tmp_path / "short" / "model.safetensors").stat().st_mtime_ns
    assert main(short) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "short" / "model.safetensors").stat().st_mtime_ns == before
    folder = tmp_path / "out"
    shutil.copytree(half_way, folder)
    assert main(command(flags, folder, "--learning_rate", "2e-3")) == 2
    error = capsys.readouterr().err
    assert "checkpoint-4 of a run with --learning_rate 0.001, not 0.002" in error
    assert "--overwrite_output_dir" in error
    # How the batch is laid out may change in mid-run.
    again = command(flags, folder, "--per_device_train_batch_size", "4", "--logging_steps", "3")
    assert main(again) == 0
    assert "going on from" in capsys.readouterr().out
    # How often it logs is what this command says, not the one before.
    logged = [line.split(",")[:3] for line in (folder / "train_log.csv").read_text().splitlines()[1:]]
    assert [step for step, *_ in logged] == ["1", "2", "3", "4", "6"]
    seconds = [float(seconds) for *_, seconds in logged]
    assert seconds == sorted(seconds)  # the clock goes on, too
    fresh = command(flags, folder, "--overwrite_output_dir", "true", "--max_steps", "1")
    assert main(fresh) == 0
    assert "going on from" not in capsys.readouterr().out
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(flags, tmp_path, capsys, monkeypatch):
    load = ConversationDataset.load

    def poisoned(self, index):
        sample = load(self, index)
        pixels = sample["images"]["pixel_values"] * (float("nan") if index == 3 else 1)
        return {**sample, "images": {"pixel_values": pixels}}

    monkeypatch.setattr(ConversationDataset, "load", poisoned)
    folder = tmp_path / "out"
    assert main(command(flags, folder)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the loss is nan" in error and "(id 's3')" in error
    assert error.count("(id ") == 1  # of a micro-batch of two
    assert not (folder / "config.json").exists()
    for checkpoint in folder.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in weights(checkpoint).values())


@pytest.mark.parametrize("value", [float("inf"), 1.5e37])
def test_a_loss_that_no_text_explains_stops_the_run_and_names_the_sample(
    flags, tmp_path, capsys, monkeypatch, value
):
    """As a label that the model can't predict gives it: finite, and the weights are gone after one step."""
    forward = DynamicLlavaForConditionalGeneration._logits

    def masked(self, hidden):
        logits = forward(self, hidden)
        logits[1, :, 9:] = torch.where(logits[1, :, 9:] == logits[1, :, 9:], -value, 0.0)
        return logits

    monkeypatch.setattr(DynamicLlavaForConditionalGeneration, "_logits", masked)
    assert main(command(flags, tmp_path / "out")) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "step 1: the loss is" in error and error.count("(id ") == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_checkpoint_that_is_not_finite_is_refused_by_the_weights_name(flags, tmp_path, capsys):
    checkpoint = tmp_path / "nan"
    shutil.copytree(flags[1], checkpoint)
    tensors = weights(checkpoint)
    name = next(name for name in tensors if "layers.2" in name)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert main(["--model_name_or_path", str(checkpoint), *command(flags, tmp_path / "out")[2:]]) == 2
    assert f"{name} has values that are not finite" in capsys.readouterr().err


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(flags, tmp_path, capsys):
    """Both would succeed, and the log would have every step twice."""
    folder = tmp_path / "out"
    folder.mkdir()
    command_line = [sys.executable, "-S", "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(command(flags, folder)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "another run is writing there" in line
        assert sorted(path.name for path in folder.iterdir()) == [".lock"]
        other.kill()
    assert main(command(flags, folder, "--max_steps", "1", "--save_strategy", "no")) == 0
    assert not (folder / ".lock").exists()


def test_a_checkpoint_named_is_used_until_the_run_has_a_newer_one(flags, half_way, tmp_path, capsys):
    folder, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(half_way, other)
    named = ["--resume_from_checkpoint", str(other / "checkpoint-2"), "--save_steps", "3", "--max_steps", "6"]
    assert main(command(flags, folder, *named)) == 0
    assert f"going on from {other / 'checkpoint-2'}" in capsys.readouterr().out
    shutil.rmtree(folder / "checkpoint-6")
    (left,) = folder.glob("checkpoint-*")
    for name in ("config.json", "run.json"):  # as if it had been killed in the middle
        path = folder / name
        path.unlink() if name == "config.json" else path.write_text(
            path.read_text().replace("true", "false", 1)
        )
    assert main(command(flags, folder, *named)) == 0
    assert f"going on from {left}" in capsys.readouterr().out
    damaged = other / "checkpoint-2" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "new").mkdir()
    kept = sealed(tmp_path / "new", 9)
    anew = ["--overwrite_output_dir", "true", *named]
    assert main(command(flags, tmp_path / "new", *anew)) == 2
    assert "not a whole checkpoint" in capsys.readouterr().err
    assert kept.exists()  # refused before anything was deleted


def test_a_checkpoint_named_in_the_folder_that_is_overwritten_stays(flags, half_way, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(half_way, folder)
    named = ["--resume_from_checkpoint", str(folder / "checkpoint-2"), "--learning_rate", "2e-3"]
    rest = ["--overwrite_output_dir", "true", "--save_strategy", "no", "--max_steps", "3"]
    assert main(command(flags, folder, *named, *rest)) == 0
    assert f"going on from {folder / 'checkpoint-2'}" in capsys.readouterr().out
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


def test_another_launchers_checkpoints_are_named_not_loaded(flags, half_way, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(half_way, folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["sharding"] == "one process or DDP"
    (folder / "run.json").write_text(json.dumps({**record, "sharding": "FSDP"}))
    assert main(command(flags, folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint-4 was saved under FSDP and can't be read under one process or DDP" in line
    named = ["--resume_from_checkpoint", str(folder / "checkpoint-4")]
    assert main(command(flags, tmp_path / "new", *named)) == 2
    assert "was saved under FSDP" in capsys.readouterr().err
    assert len(list(folder.glob("checkpoint-*"))) == 2
    (folder / "run.json").write_text(json.dumps(record))
    for other, said in (
        ("--lora_rank 2", "lora_rank 0, not 2"),
        ("--mode image", "mode image_text, not image"),
    ):
        assert main(command(flags, tmp_path / "new", *named, *other.split())) == 2
        assert f"checkpoint-4 is of a run with {said}; start as that run was" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scheduler.pt", "trainer_state.json", "model.safetensors"])
def test_a_checkpoint_damaged_in_its_old_size_is_passed_over_with_one_line(
    flags, uninterrupted, half_way, tmp_path, capsys, name
):
    """A damaged scheduler or state was a traceback, damaged weights were trained on."""
    folder = tmp_path / "out"
    shutil.copytree(half_way, folder)
    damaged = folder / "checkpoint-4" / name
    content = bytearray(damaged.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 8):
        content[place] ^= 0xFF
    damaged.write_bytes(content)
    assert main(command(flags, folder)) == 0
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if "not used" in line]
    assert f"checkpoint-4: not used, {name} is damaged" in line and "checkpoint-2\n" in said.out
    assert same(weights(uninterrupted[0]), weights(folder))


@pytest.mark.parametrize("name", ["run.json", "train_log.csv", "skipped.jsonl"])
def test_a_disk_that_is_full_for_small_files_is_one_line(flags, tmp_path, capsys, monkeypatch, name):
    folder = tmp_path / "out"
    folder.mkdir()
    if name == "skipped.jsonl":  # which is appended to; the others are written beside, then moved into place
        (folder / name).symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"skipped\.jsonl: cannot be written \(No space left"):
            SkippedSamples(folder / name).add((0, "unreadable", ""))
        return
    beside = tempfile.mkstemp

    def full(prefix, dir):
        descriptor, path = beside(prefix=prefix, dir=dir)
        if prefix == f".{name}-":
            os.close(descriptor)
            descriptor = os.open("/dev/full", os.O_WRONLY)
        return descriptor, path

    monkeypatch.setattr("dynllava_plugin.files.tempfile.mkstemp", full)
    assert main(command(flags, folder, "--max_steps", "1", "--save_strategy", "no")) == 2
    assert not list(folder.glob(f"*{name}*"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{name}: cannot be written (No space left on device)" in line


def test_a_run_of_other_data_or_other_bad_samples_is_told_apart(tmp_path):
    RunRecord(tmp_path, {"data_path": "5ha256"}, "FSDP").write(finished=False)
    for data, told in (
        ("5ha256", None),
        ("0ther", "on other data"),
        ("5ha256 without 1", "images came or went"),
    ):
        difference = RunRecord(tmp_path, {"data_path": data}, "FSDP").difference()
        assert told in difference if told else difference is None


def test_run_record_is_readable(uninterrupted):
    record = json.loads((uninterrupted[0] / "run.json").read_text())
    assert record["finished"] and record["arguments"]["learning_rate"] == 1e-3
