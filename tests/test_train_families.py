"""Training of every family: labels under its chat template, what moves, what stays, and what the saved checkpoint says."""

from __future__ import annotations

import copy
import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import train.finetune
from dynllava_plugin import load_model
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.llava_json import Sample
from dynllava_plugin.model.prompts import vicuna_v1, with_images
from dynllava_plugin.sparsity.kernels.blocks import PADDING
from dynllava_plugin.sparsity.masked_softmax import context_matrix, plain_masked_softmax, visible_matrix
from tests.families.checkpoints import (
    FAMILIES,
    picture,
    stock_config,
    stock_model,
    stock_processor,
    write_checkpoint,
)
from tests.families.oracle import oracle_logits
from tests.training_kit import conversation
from train.chat import ChatEncoder
from train.conversation import IGNORE, ConversationEncoder
from train.data import Collator, ConversationDataset, encoder_of
from train.mixture import open_mixture
from train.noise import gumbel_noise
from train.skipped import SkippedSamples, UnusableSample
from train.trainer import DynamicLlavaTrainer, freeze

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
    rows.append(
        {"id": "two", "image": ["red.png", "blue.png"], "conversations": conversation((both, "blue"))}
    )
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


@pytest.fixture
def loaded(checkpoint):
    """`load_model` of a family's checkpoint, fresh for each test and the same in it."""
    return functools.cache(lambda family: load_model(checkpoint(family), device="cpu"))


def recipe(checkpoint: Path, mixture: list[str], out: Path, steps: int) -> list[str]:
    rates = (
        "--learning_rate 3e-3 --predictor_learning_rate 1e-3 --lr_scheduler_type constant --warmup_steps 0"
    )
    how = (
        f"--max_steps {steps} --global_batch_size 4 --per_device_train_batch_size 2 --logging_steps 1 {rates}"
    )
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
    encoder = encoder_of(model, processor)
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


END = dict.fromkeys(FAMILIES, "<|im_end|>") | dict.fromkeys(
    ("llava_llama", "llava_mistral", "llava_next", "mistral3"), "</s>"
)
# The others' templates write an earlier answer otherwise than they ask for one.
SAME_LATER = {"qwen2_5_vl", "qwen3_vl", "internvl", "mistral3", "llava_llama"}


@every_family
@pytest.mark.parametrize("images", [(1,), (0,), (2, 0), (1, 1), (0, 0, 0)])
def test_labels_are_the_answers_with_their_end_behind_the_prompts_of_inference(
    family: str, images: tuple[int, ...], loaded
) -> None:
    model, processor = loaded(family)
    encoder = encoder_of(model, processor)
    answers = ["red", "There is one shape on the left.", "no 3"]
    turns = [
        (with_images(f"What color is shape {round}?", count), answers[round])
        for round, count in enumerate(images)
    ]
    pictures = [picture(size, seed) for seed, size in enumerate(SIZES[: sum(images)])]
    tokens, inputs = encoder.encoded(Sample("s", ("x",) * len(pictures), tuple(turns)), pictures)
    assert len(tokens.input_ids) == len(tokens.labels) and (inputs is None) == (not pictures)
    labelled = [at for at, label in enumerate(tokens.labels) if label != IGNORE]
    starts = [at for at in labelled if at - 1 not in labelled]
    ends = [at + 1 for at in labelled if at + 1 not in labelled]
    assert len(starts) == len(turns)
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        assert tokens.labels[start:end] == tokens.input_ids[start:end]
        said = processor.tokenizer.decode(tokens.labels[start:end]).replace("▁", " ").strip()
        assert said == answers[place] + END[family]
        shown = pictures[: sum(images[: place + 1])]
        # OneVision shows images whole where a sample has several, in tiles where it has one.
        alike = family != "llava_onevision" or len(shown) == len(pictures)
        if alike and (place == 0 or family in SAME_LATER):
            asked = [*turns[:place], (turns[place][0], None)]
            prompt = prompt_inputs(processor, encoder, shown, asked)
            assert prompt["input_ids"][0].tolist() == tokens.input_ids[:start]
            for name, value in (inputs or {}).items() if len(shown) == len(pictures) else ():
                assert torch.equal(torch.as_tensor(prompt[name]), value), name


def batch_of(family: str, loaded, samples: list[tuple[tuple[int, ...], str]]) -> list[dict[str, Any]]:
    """Rows as the dataset gives them: samples of (images of each round, last answer)."""
    model, processor = loaded(family)
    encoder, rows = encoder_of(model, processor), []
    for number, (images, answer) in enumerate(samples):
        turns = [(with_images("What color is the shape?", count), "red") for count in images]
        turns[-1] = (turns[-1][0], answer)
        pictures = [picture(SIZES[(number + place) % 4], 10 * number + place) for place in range(sum(images))]
        tokens, inputs = encoder.encoded(Sample("s", ("x",) * len(pictures), tuple(turns)), pictures)
        rows.append({**vars(tokens), "images": inputs, "sample": number})
    return rows


MIXED = [
    ((1,), "There is a red circle."),
    ((2, 0), "no"),
    ((0,), "Yes, on the left."),
    ((1, 1), "two shapes"),
]


@every_family
def test_a_collated_batch_is_its_samples(family: str, loaded) -> None:
    model, processor = loaded(family)
    rows = batch_of(family, loaded, MIXED)
    encoder = encoder_of(model, processor)
    collate = Collator(processor.tokenizer.pad_token_id, encoder.stand_in())

    def terms(of: list[dict[str, Any]]) -> torch.Tensor:
        batch = collate(of)
        samples = batch.pop("sample")
        places = batch["input_ids"] == model.config.image_token_id
        noise = gumbel_noise(1, 2, samples, places, batch["labels"])
        out = model(**batch, gumbel_noise=noise, num_items_in_batch=10)
        return torch.stack(
            [out.lm_loss, *(term * len(of) for term in (out.image_keep_loss, out.text_keep_loss))]
        )

    model.train()
    with torch.no_grad():
        together, alone = terms(rows), sum(terms([row]) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@every_family
def test_a_batch_without_images_gives_every_trained_parameter_a_gradient(family: str, loaded) -> None:
    model, processor = loaded(family)
    encoder = encoder_of(model, processor)
    rows = batch_of(family, loaded, [((0,), "There is a red circle."), ((0, 0), "no")])
    batch = Collator(processor.tokenizer.pad_token_id, encoder.stand_in())(rows)
    batch.pop("sample")
    freeze(model.train())
    out = model(**batch)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert out.image_keep_loss == 0 and out.lm_loss == model(**texts).lm_loss
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == frozen(name), name
        if "image_predictor" in name:
            assert not parameter.grad.any(), name


@every_family
def test_one_step_is_the_stock_model_under_masks_and_its_gradient_that_of_the_whole_matrix(
    family: str, loaded, monkeypatch
) -> None:
    model, processor = loaded(family)
    model.train()
    model.set_sparsity(min_text_length=1)
    (row,) = batch_of(family, loaded, [((1,), "There is a red circle on the left.")])
    batch = Collator(processor.tokenizer.pad_token_id, {})([row])
    samples = batch.pop("sample")
    places = batch["input_ids"] == model.config.image_token_id
    batch["gumbel_noise"] = gumbel_noise(3, 1, samples, places, batch["labels"])

    def step() -> tuple[Any, dict[str, torch.Tensor]]:
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        return out, {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None and not frozen(name)
        }

    out, gradients = step()
    keep = torch.ones(len(row["input_ids"]), dtype=torch.bool)
    keep[places[0]] = out.image_keep[0]
    keep[batch["labels"][0] != IGNORE] = out.text_keep[0]
    assert 0 < out.image_keep.sum() < out.image_keep.numel() and not out.text_keep.all()
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "gumbel_noise")}
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = places.int()
    logits = oracle_logits(stock_model(family), inputs, gate_layer=2, keep=keep)
    torch.testing.assert_close(out.logits[0], logits, atol=5e-5, rtol=0)
    wanted = torch.nn.functional.cross_entropy(logits[:-1], batch["labels"][0, 1:])
    torch.testing.assert_close(out.lm_loss, wanted, atol=1e-5, rtol=1e-5)

    def whole(query, key, value, context, scaling):
        matrix, visible = context_matrix(context.keep), visible_matrix(context.packing[:, 2] != PADDING)
        return plain_masked_softmax(query, key, value, matrix, visible, scaling)

    monkeypatch.setattr("dynllava_plugin.model.attention.masked_softmax_attention", whole)
    _, expected = step()
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm() + 1e-7, name


def test_the_command_line_trains_a_qwen2_5_vl(checkpoint, mixture: list[str], tmp_path: Path) -> None:
    flags = recipe(checkpoint("qwen2_5_vl"), mixture, tmp_path / "out", 2)
    grouped = ["--train_sampling_strategy", "group_by_length", "--gradient_checkpointing", "true"]
    done = subprocess.run(
        [sys.executable, "train/finetune.py", *flags, *grouped],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "8 samples (0 text-only left out), global batch 4 = 2 x 1 processes x 2" in done.stdout
    assert len(losses(tmp_path / "out")) == 2
    model, _ = load_model(tmp_path / "out", device="cpu")
    assert type(model).__name__ == "DynamicQwen2_5_VLForConditionalGeneration"


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "llava_next"]
)  # whose files have other names than the model's
def test_an_interrupted_run_goes_on_to_the_same_weights(
    family: str, checkpoint, mixture: list[str], tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for out in (whole, halves):
        flags = [*recipe(checkpoint(family), mixture, out, 4), "--save_steps", "2"]
        assert train.finetune.main(flags) == 0
        if out is halves:
            shutil.rmtree(out / "checkpoint-4")
            for path in (out / "model.safetensors", out / "config.json"):
                path.unlink()
            record = out / "run.json"
            record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
            assert train.finetune.main(flags) == 0
    one, other = (load_file(out / "model.safetensors") for out in (whole, halves))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    on_the_way, _ = load_model(halves / "checkpoint-2", device="cpu")
    assert not torch.equal(on_the_way.lm_head.weight, load_model(halves, device="cpu")[0].lm_head.weight)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_an_adapter_trains_and_loading_merges_it(
    family: str, checkpoint, mixture: list[str], tmp_path: Path
) -> None:
    from peft import PeftModel

    out = tmp_path / "out"
    flags = [*recipe(checkpoint(family), mixture, out, 3), "--save_strategy", "no", "--lora_rank", "4"]
    assert train.finetune.main(flags) == 0
    assert not (out / "model.safetensors").exists()
    merged, _ = load_model(out, device="cpu")
    base, _ = load_model(checkpoint(family), device="cpu")
    was = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = PeftModel.from_pretrained(base, str(out)).merge_and_unload().state_dict()
    now = merged.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    moved = {name for name in was if not torch.equal(was[name], now[name])}
    assert not [name for name in moved if frozen(name) or "embed_tokens" in name or "lm_head" in name]
    assert any("image_predictor" in name for name in moved) and any("down_proj" in name for name in moved)


def test_tied_embeddings_stay_tied(mixture: list[str], tmp_path: Path) -> None:
    config = stock_config("qwen2_5_vl")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path / "tied")
    stock_processor("qwen2_5_vl").save_pretrained(tmp_path / "tied")
    flags = recipe(tmp_path / "tied", mixture, tmp_path / "out", 2)
    assert train.finetune.main([*flags, "--save_strategy", "no"]) == 0
    model, _ = load_model(tmp_path / "out", device="cpu")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    before, _ = load_model(tmp_path / "tied", device="cpu")
    assert not torch.equal(before.lm_head.weight, model.lm_head.weight)


def test_lengths_are_about_those_of_the_tokens(tmp_path: Path, loaded) -> None:
    model, processor = loaded("qwen2_5_vl")
    rows = []
    for number in range(24):
        folder, size = ("small", (28, 28)) if number % 3 else ("large", (112, 112))
        (tmp_path / folder).mkdir(exist_ok=True)
        picture(size, number).save(tmp_path / folder / f"{number}.png")
        turns = conversation(("<image>\nWhat color is the shape?", "red " * (1 + number % 5)))
        rows.append({"id": str(number), "image": f"{folder}/{number}.png", "conversations": turns})
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    (tmp_path / "small" / "1.png").write_bytes(b"no image")
    mixture, _ = open_mixture(tmp_path / "mix.json", tmp_path / "cache")
    skipped = SkippedSamples(tmp_path / "skipped.jsonl")
    dataset = ConversationDataset(mixture, tmp_path, encoder_of(model, processor), 2048, False, skipped)
    readable = [number for number in range(24) if number != 1]
    exact = [len(dataset[number]["input_ids"]) for number in readable]
    assert np.corrcoef(exact, dataset.lengths()[readable])[0, 1] > 0.9
    assert not skipped.path.exists()


@pytest.mark.parametrize(
    ("family", "template", "answer", "named"),
    [
        ("qwen2_5_vl", None, "see <|image_pad|>", "1 <|image_pad|> for 0 images"),
        ("mistral3", None, "see [IMG]", "1 [IMG] for 0 images"),
        ("internvl", "{{ messages[0]['role'] }}", "red", "doesn't render an assistant's answer"),
        (
            "internvl",
            "{{ raise_exception('odd') }}",
            "red",
            "--model_name_or_path: the checkpoint's chat template can't write it (odd)",
        ),
        ("internvl", None, "answer0dynllava", "in another order"),
    ],
)
def test_what_has_no_labels(family: str, template: str | None, answer: str, named: str) -> None:
    processor = copy.copy(stock_processor(family))
    processor.chat_template = template or processor.chat_template
    question = answer if "order" in named else "What is there?"
    with pytest.raises(UserError, match=re.escape(named)):
        ChatEncoder(processor).encoded(Sample("s", (), ((question, answer),)), [])


def test_an_image_that_the_processor_refuses_is_an_unreadable_one() -> None:
    encoder = ChatEncoder(stock_processor("qwen2_5_vl"))
    sample = Sample("mix.json: sample 7", ("x.png",), (("<image>\nWhat is there?", "red"),))
    with pytest.raises(UnusableSample, match=r"sample 7: the processor refuses its images \(.*ratio"):
        encoder.encoded(sample, [Image.new("RGB", (900, 2))])


def test_a_sample_that_the_family_cannot_take_ends_neither_training_nor_an_evaluation(
    checkpoint, tmp_path: Path
) -> None:
    """A picture of odd proportions, the family's own placeholder in a text: skipped where they come up, in either part."""
    rows = []
    for number, size in enumerate([(56, 56)] * 4 + [(900, 2), (56, 56)]):
        picture(size, number).save(tmp_path / f"{number}.png")
        question = "What is <|image_pad|>?" if number == 5 else "What color is the shape?"
        turns = conversation((f"<image>\n{question}", "red"))
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    data = ["--data_path", str(tmp_path / "mix.json"), "--image_folder", str(tmp_path)]
    data += ["--data_cache", str(tmp_path / "cache"), "--skip_bad", "2", "--held_out", "3"]
    everything, _ = open_mixture(tmp_path / "mix.json", tmp_path / "cache")
    held = {seed: {*train.finetune.split(everything, 3, seed)[1].rows} for seed in range(40)}
    for bad_held_out in ({4, 5}, set()):
        seed = next(seed for seed, rows in held.items() if rows & {4, 5} == bad_held_out)
        out = tmp_path / f"out{seed}"
        flags = [*recipe(checkpoint("qwen2_5_vl"), data, out, 1), "--seed", str(seed), "--eval_steps", "1"]
        assert train.finetune.main([*flags, "--save_strategy", "no"]) == 0
        said = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
        assert {(one["sample"], one["kind"]) for one in said} == {(4, "unreadable"), (5, "malformed")}
        with (out / "eval_log.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert float(row["eval_samples"]) == 3 - len(bad_held_out)


def test_held_out_samples_are_asked_as_in_training(checkpoint, mixture: list[str], tmp_path: Path) -> None:
    flags = [*recipe(checkpoint("qwen2_5_vl"), mixture, tmp_path / "out", 20), "--held_out", "3"]
    assert train.finetune.main([*flags, "--eval_steps", "20", "--save_strategy", "no"]) == 0
    with (tmp_path / "out" / "eval_log.csv").open() as file:
        (row,) = csv.DictReader(file)
    model, processor = load_model(tmp_path / "out", device="cpu")
    _, held_out = train.finetune.split(open_mixture(mixture[1], mixture[7], text_only=True)[0], 3, 42)
    encoder, perplexities, right = encoder_of(model, processor), [], []
    for sample in held_out:
        pictures = [Image.open(Path(mixture[3]) / name).convert("RGB") for name in sample.images]
        (question, answer), *_ = sample.turns[::-1]
        given = prompt_inputs(processor, encoder, pictures, [*sample.turns[:-1], (question, None)])
        length = given["input_ids"].shape[1]
        ids = torch.tensor([processor.tokenizer(answer)["input_ids"]])
        inputs = {name: value for name, value in given.items() if name in ("pixel_values", "image_grid_thw")}
        inputs["input_ids"] = torch.cat([given["input_ids"], ids], 1)
        labels = inputs["input_ids"].clone()
        labels[:, :length] = IGNORE
        scores = model.score_details(**inputs, labels=labels).log_probs
        perplexities.append(float((-scores.sum() / ids.shape[1]).exp()))
        said = model.generate(**given, max_new_tokens=64, do_sample=False)[0, length:]
        right.append(processor.tokenizer.decode(said, skip_special_tokens=True).strip() == answer)
    assert float(row["eval_ppl"]) == pytest.approx(np.mean(perplexities), rel=1e-3)
    assert float(row["eval_accuracy"]) == pytest.approx(np.mean(right))
