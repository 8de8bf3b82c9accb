"""Evaluation during training, and what the logs hold."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynllava_plugin import load_model
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.engine.requests import Generation, Request
from dynllava_plugin.model.prompts import vicuna_v1
from dynllava_plugin.sparsity.config import SparsityConfig
from tests.training_kit import save_checkpoint, save_mixture
from train.finetune import main, split
from train.measures import off_target
from train.mixture import open_mixture

RECIPE = "--global_batch_size 4 --per_device_train_batch_size 4 --max_steps 4 --learning_rate 1e-3 --seed 3"


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("evaluation")
    mixture, images = save_mixture(folder / "data", samples=12)
    return [
        *("--model_name_or_path", str(save_checkpoint(folder / "checkpoint")), "--data_path", str(mixture)),
        *("--image_folder", str(images), "--data_cache", str(folder / "cache"), "--use_cpu"),
        *("--logging_steps", "2", "--dataloader_num_workers", "0", "--save_strategy", "no"),
        *("--held_out", "5", *RECIPE.split()),
    ]


@pytest.fixture(scope="module")
def evaluated(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    logs = ["--eval_steps", "2", "--report_to", "tensorboard"]
    assert main([*flags, *logs, "--output_dir", str(folder)]) == 0
    return folder


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_metrics_are_those_of_the_engine_on_the_saved_model(flags, evaluated):
    table = rows(evaluated / "eval_log.csv")
    assert [row["step"] for row in table] == [2, 4]
    mixture, _ = open_mixture(flags[3], flags[7])
    training, held_out = split(mixture, 5, 3)
    assert {*training.rows} | {*held_out.rows} == {*range(12)} and len(training) == 7
    model, processor = load_model(evaluated, device="cpu")
    engine = Engine(model, processor, batch_size=1)
    right, short, perplexities, kept, images, stayed, fed_back = 0, 0, [], 0, 0, 0, 0
    for sample in held_out:
        question, answer = sample.turns[-1]
        prompt = vicuna_v1([*sample.turns[:-1], (question, None)])
        images_of = (str(Path(flags[5]) / sample.images[0]),)
        scored = Request(prompt, images_of, continuation=f" {answer}")
        perplexities.append(engine.score([scored])[0].perplexity)
        (given,) = engine.generate([Request(prompt, images_of)], Generation.from_task({"max_new_tokens": 64}))
        kept, images = kept + given.kept_image_tokens, images + given.image_tokens
        stayed, fed_back = stayed + given.kept_tokens, fed_back + given.cached_tokens
        if len(answer.split()) <= 3:
            short += 1
            right += given.text.lower() == answer.lower()
    last = table[-1]
    assert last["eval_ppl"] == pytest.approx(sum(perplexities) / 5, rel=1e-4)
    assert last["eval_accuracy"] == right / short and last["eval_samples"] == 5
    assert last["eval_kept_image_share"] == kept / images == 3 / 16
    assert last["eval_kept_output_share"] == stayed / fed_back


def test_evaluating_changes_no_weight(flags, evaluated, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer_callback.logger.warning", said.append)
    assert (
        main([*flags, "--eval_steps", "100", "--report_to", "none", "--output_dir", str(tmp_path / "out")])
        == 0
    )
    assert not said
    with_, without = (load_file(path / "model.safetensors") for path in (evaluated, tmp_path / "out"))
    assert all(torch.equal(tensor, without[name]) for name, tensor in with_.items())


def test_tensorboard_has_the_log(evaluated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = evaluated.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    for name in (
        "loss",
        "lm_loss",
        "image_keep_rate",
        "image_keep_rate_std",
        "text_keep_rate",
        "tau",
        "lr_llm",
    ):
        assert f"train/{name}" in tags, name
    for name in ("samples_per_second", "tokens_per_second", "peak_memory_gib", "hours_left"):
        assert f"train/{name}" in tags, name
    assert {"eval/ppl", "eval/accuracy", "eval/kept_image_share"} <= tags
    logged = {event.step: event.value for event in board.Scalars("train/image_keep_rate")}
    table = {row["step"]: row["image_keep_rate"] for row in rows(evaluated / "train_log.csv")}
    assert logged == pytest.approx(table)


def test_held_out_images_that_cannot_be_read_are_found_before_training(tmp_path, flags, capsys):
    data, images = save_mixture(tmp_path / "data", samples=8)
    _, held_out = split(open_mixture(data, tmp_path / "cache")[0], 3, 3)
    for sample in held_out:
        broken = images / sample.images[0]
        whole = broken.read_bytes()
        broken.write_bytes(whole[:40])
    place = ["--data_path", str(data), "--image_folder", str(images), "--output_dir", str(tmp_path / "out")]
    command = [
        *flags,
        *place,
        "--held_out",
        "3",
        "--max_steps",
        "1",
        "--report_to",
        "none",
        "--eval_steps",
        "1",
    ]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 x " in line and "unreadable image" in line and "--skip_bad allows 0 (all in" in line
    assert main([*command, "--skip_bad", "3"]) == 2
    assert "--held_out 3: none of these" in capsys.readouterr().err
    broken.write_bytes(whole)
    assert main([*command, "--skip_bad", "2"]) == 0
    assert "skipped samples: 2 (2 unreadable)" in capsys.readouterr().out
    assert [row["eval_samples"] for row in rows(tmp_path / "out" / "eval_log.csv")] == [1]


def test_evaluation_without_samples_is_refused(flags, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    assert main([*flags, *out, "--held_out", "0", "--eval_strategy", "steps"]) == 2
    assert "--held_out" in capsys.readouterr().err
    assert main([*flags, *out, "--held_out", "12"]) == 2
    assert "none would be left" in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "said"), [(0.09, True), (0.11, False), (0.29, False), (0.31, True)])
def test_a_keep_rate_far_from_its_target_is_said_on_either_side(rate, said):
    """Of the last row that has it; 0.1 off is far."""
    history = [{"image_keep_rate": 0.9, "text_keep_rate": 0.5}, {"image_keep_rate": rate}]
    line = off_target(history, SparsityConfig(mode="image_text", vision_keep_rate=0.2))
    assert bool(line) == said and "text_keep_rate" not in line
    low = off_target([{"text_keep_rate": 0.5 - rate}], SparsityConfig(mode="image_text"))
    assert bool(low) == (rate > 0.1)
