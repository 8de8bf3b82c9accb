"""Training of every family: labels under its chat template, what moves, what stays, and what the saved checkpoint says."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import train.finetune
from dynllava_plugin import load_model
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import vicuna_v1, with_images
from tests.families.checkpoints import FAMILIES, picture, stock_processor, write_checkpoint
from tests.training_kit import conversation
from train.conversation import IGNORE, ConversationEncoder
from train.data import Collator, encoder_of
from train.noise import gumbel_noise
from train.samples import Sample
from train.trainer import DynamicLlavaTrainer

ROOT = Path(__file__).parents[1]
COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}
SIZES = [(56, 84), (28, 28), (84, 42), (64, 64)]
STEPS = 30
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> list[str]:
    """Flags of a mixture of drawn shapes: two rounds, one, two images in one sample, and a text alone."""
    folder = tmp_path_factory.mktemp("shapes")
    rows: list[dict[str, Any]] = []
    for number, (color, size) in enumerate(zip(COLORS, SIZES, strict=True)):
        drawn = Image.new("RGB", size, "white")
        ImageDraw.Draw(drawn).rectangle((8, 8, size[0] - 8, size[1] - 8), fill=COLORS[color])
        drawn.save(folder / f"{color}.png")
        turns = [("<image>\nWhat color is the shape?", color), ("Is there a circle?", "no")][: 1 + number % 2]
        rows.append({"id": color, "image": f"{color}.png", "conversations": conversation(*turns)})
    both = "<image>\n<image>\nWhat color is the shape on the right?"
    rows.append({"id": "two", "image": ["red.png", "blue.png"], "conversations": conversation((both, "blue"))})
    rows += [{"id": "text", "conversations": conversation(("Is red a color?", "yes"))}] * 3
    (folder / "mix.json").write_text(json.dumps(rows))
    given = ["--data_path", str(folder / "mix.json"), "--image_folder", str(folder), "--text_only", "true"]
    return [*given, "--data_cache", str(folder / "cache")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")

    def of(family: str) -> Path:
        return folder / family if (folder / family).exists() else write_checkpoint(family, folder / family)

    return of


def recipe(checkpoint: Path, mixture: list[str], out: Path, steps: int) -> list[str]:
    rates = "--learning_rate 3e-3 --predictor_learning_rate 1e-3 --lr_scheduler_type constant --warmup_steps 0"
    how = f"--max_steps {steps} --global_batch_size 4 --per_device_train_batch_size 2 --logging_steps 1 {rates}"
    quiet = "--use_cpu --report_to none --dataloader_num_workers 0 --min_text_length 1 --keep_loss_weight 1"
    place = ["--model_name_or_path", str(checkpoint), "--output_dir", str(out)]
    return [*place, *mixture, *how.split(), *quiet.split()]


def losses(out: Path) -> list[float]:
    with (out / "train_log.csv").open() as file:
        return [float(row["lm_loss"]) for row in csv.DictReader(file)]


def frozen(name: str) -> bool:
    return not name.startswith(("model.language_model.", "lm_head."))


@every_family
def test_training_lowers_the_loss_and_its_checkpoint_is_the_trained_model(
    family: str, checkpoint, mixture: list[str], tmp_path: Path, monkeypatch
) -> None:
    made: list[DynamicLlavaTrainer] = []

    class Kept(DynamicLlavaTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(train.finetune, "DynamicLlavaTrainer", Kept)
    out = tmp_path / "out"
    flags = recipe(checkpoint(family), mixture, out, STEPS)
    assert train.finetune.main([*flags, "--save_steps", str(STEPS)]) == 0
    curve = losses(out)
    assert sum(curve[-4:]) < 0.5 * sum(curve[:4])
    (trainer,) = made
    before, _ = load_model(checkpoint(family), device="cpu")
    was, now = before.state_dict(), trainer.dynamic.state_dict()
    moved = {name for name in was if not torch.equal(was[name], now[name])}
    assert not [name for name in moved if frozen(name)]
    for part in ("image_predictor", "text_predictor", "layers.0.", "layers.3.", "embed_tokens", "lm_head"):
        assert any(part in name for name in moved), part
    loaded, processor = load_model(out, device="cpu")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, now[name]), name
    dataset = trainer.train_dataset
    batch = trainer.data_collator([dataset[index] for index in range(len(dataset))])
    batch.pop("sample")
    with torch.no_grad():
        trained, again = (model.eval()(**batch).loss for model in (trainer.dynamic, loaded))
    assert torch.equal(trained, again) and trained < 0.5 * curve[0]
    to_go_on = load_file(out / f"checkpoint-{STEPS}" / "model.safetensors")
    assert to_go_on.keys() == now.keys() and all(torch.equal(to_go_on[name], now[name]) for name in now)
    with Image.open(dataset.image_folder / "red.png") as red:
        answer = answered(loaded, processor, [red.convert("RGB")], "What color is the shape?")
    assert answer == "red"


def answered(model: Any, processor: Any, images: list[Image.Image], question: str) -> str:
    """The greedy answer to the prompt that training stands answers behind."""
    encoder = encoder_of(processor, model.config.image_token_id)
    inputs = prompt_inputs(processor, encoder, images, [(with_images(question, len(images)), None)])
    given = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, given:]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def prompt_inputs(processor: Any, encoder: Any, images: list[Image.Image], turns: list) -> Any:
    """What inference gives the model of a conversation that ends with a question."""
    more: dict[str, Any] = {"images": [images]} if images else {}
    if isinstance(encoder, ConversationEncoder):
        return processor(text=[vicuna_v1(turns)], return_tensors="pt", **more)
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        count = question.count("<image>")
        content = [{"type": "image"}] * count + [{"type": "text", "text": question.replace("<image>\n", "")}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    doubled = processor.tokenizer.bos_token is not None and text.startswith(processor.tokenizer.bos_token)
    return processor(text=[text], return_tensors="pt", add_special_tokens=not doubled, **more)
