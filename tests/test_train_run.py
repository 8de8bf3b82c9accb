"""Training runs on a LLaVA of a few thousand parameters, through the command itself."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import set_seed

from dynllava_plugin import load_model
from dynllava_plugin.cli import main as dynllava
from tests.training_kit import conversation, save_checkpoint, save_mixture
from train.command_line import parse
from train.finetune import main
from train.noise import gumbel_noise
from train.sampling import EpochSampler
from train.skipped import most_frequent
from train.trainer import PREDICTORS, DynamicLlavaTrainer, freeze

ROOT = Path(__file__).parents[1]
MEASURED = {
    "seconds",
    "grad_norm",
    "samples_per_second",
    "tokens_per_second",
    "peak_memory_gib",
    "hours_left",
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("training")
    mixture, images = save_mixture(folder / "data")
    checkpoint = save_checkpoint(folder / "checkpoint")
    return [
        *(
            "--model_name_or_path",
            str(checkpoint),
            "--data_path",
            str(mixture),
            "--image_folder",
            str(images),
        ),
        *("--use_cpu", "--logging_steps", "1", "--report_to", "none", "--dataloader_num_workers", "0"),
        *("--data_cache", str(folder / "cache"), "--save_strategy", "no"),
    ]


def log(folder: Path) -> list[dict[str, float]]:
    with (folder / "train_log.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_command_lowers_the_loss_and_saves_a_checkpoint_that_loads(flags, tmp_path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "train/finetune.py",
    ]
    recipe = ["--max_steps", "3", "--global_batch_size", "8", "--learning_rate", "5e-3"]
    constant = "--warmup_steps 0 --lr_scheduler_type constant --activation_checkpointing true".split()
    done = subprocess.run(
        [*command, *flags, *recipe, *constant, "--output_dir", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r".*(?:Warning|deprecated|\[transformers\]|bitsandbytes|kernels).*", done.stderr)
    assert not said
    assert "8 samples (1 text-only left out)" in done.stdout
    rows = log(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    model, processor = load_model(tmp_path / "out", device="cpu")
    assert model.config.text_config.use_cache and not hasattr(model.config, "use_cache")
    inputs = processor(text=["yes"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert not list((tmp_path / "out").glob("*.bin")) and not (tmp_path / "out" / ".model").exists()


@pytest.fixture(scope="module")
def two_steps(flags, tmp_path_factory) -> dict[str, tuple[list, dict]]:
    """(log, weights) after two steps of plain gradient descent on 4 samples, in portions of 4 and of 1."""
    runs = {}
    for portion in ("4", "1"):
        folder = tmp_path_factory.mktemp("run") / portion
        batch = f"--global_batch_size 4 --per_device_train_batch_size {portion} --max_steps 2"
        descent = "--optim sgd --learning_rate 0.1 --predictor_learning_rate 0.01 --max_grad_norm 0"
        recipe = f"{batch} {descent} --warmup_steps 0 --lr_scheduler_type constant".split()
        assert main([*flags, *recipe, "--output_dir", str(folder)]) == 0
        runs[portion] = (log(folder), load_file(folder / "model.safetensors"))
    return runs


def test_accumulated_samples_equal_a_batch(two_steps):
    """Neither padding nor the portion matters: 4 samples at once = 4 accumulated ones."""
    (at_once, weights), (accumulated, others) = two_steps.values()
    for row, other in zip(at_once, accumulated, strict=True):
        for name in row.keys() - MEASURED:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_changes_nothing(two_steps, flags, tmp_path):
    _, weights = two_steps["4"]
    recipe = (
        "--global_batch_size 4 --per_device_train_batch_size 4 --max_steps 2 --gradient_checkpointing true"
    )
    descent = "--optim sgd --learning_rate 0.1 --predictor_learning_rate 0.01 --max_grad_norm 0"
    recipe = f"{recipe} {descent} --warmup_steps 0 --lr_scheduler_type constant"
    assert main([*flags, *recipe.split(), "--output_dir", str(tmp_path / "out")]) == 0
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-7, msg=name)


def test_bf16_trains_float32_weights_and_saves_bfloat16(flags, tmp_path):
    recipe = "--global_batch_size 8 --max_steps 3 --learning_rate 5e-3 --warmup_steps 0 --bf16 true"
    constant = "--lr_scheduler_type constant --save_strategy steps --save_steps 2"
    assert main([*flags, *recipe.split(), *constant.split(), "--output_dir", str(tmp_path / "out")]) == 0
    rows = log(tmp_path / "out")
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    within = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    assert {tensor.dtype for tensor in within.values()} == {torch.float32}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for name, tensor in saved.items():
        assert torch.equal(tensor, within[name].bfloat16()), name
    model, _ = load_model(tmp_path / "out", device="cpu")
    assert model.dtype == torch.bfloat16


def test_log_says_what_was_minimised(two_steps):
    rows, _ = two_steps["4"]
    for step, row in enumerate(rows):
        assert row["loss"] == pytest.approx(
            row["lm_loss"] + 100 * (row["image_keep_loss"] + row["text_keep_loss"]), rel=1e-5
        )
        assert row["tau"] == pytest.approx(math.pow(0.1, step / 2))
        assert (row["lr_llm"], row["lr_predictor"]) == (0.1, 0.01)
        assert 0 < row["image_keep_rate"] < 1 and 0 < row["text_keep_rate"] < 1


def test_only_llm_and_predictors_move(two_steps, flags):
    before = load_file(Path(flags[1]) / "model.safetensors")
    _, after = two_steps["4"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if "vision_tower" in name or "multi_modal_projector" in name]
    for part in (*PREDICTORS[:2], "language_model.layers", "embed_tokens", "lm_head"):
        assert [name for name in moved if part in name], part


def test_each_trained_parameter_has_its_learning_rate(flags, tmp_path):
    set_seed(0)
    model, _ = load_model(flags[1], device="cpu")
    freeze(model)
    args = parse([*flags, "--output_dir", str(tmp_path)])[2]
    optimizer = DynamicLlavaTrainer(model=model, args=args, train_dataset=[0]).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        predictor = any(part in name for part in PREDICTORS)
        frozen = name.startswith(("model.vision_tower", "model.multi_modal_projector"))
        assert rates.get(id(parameter)) == (None if frozen else 2e-4 if predictor else 5e-6), name


def test_the_projector_trains_at_the_rate_of_the_llm_where_asked(flags, tmp_path):
    set_seed(0)
    model, _ = load_model(flags[1], device="cpu")
    freeze(model, train_projector=True)
    args = parse([*flags, "--output_dir", str(tmp_path)])[2]
    optimizer = DynamicLlavaTrainer(model=model, args=args, train_dataset=[0]).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {rates.get(id(p)) for n, p in named.items() if "multi_modal_projector" in n} == {5e-6}
    assert {rates.get(id(p)) for n, p in named.items() if "vision_tower" in n} == {None}
    recipe = "--train_projector true --global_batch_size 4 --max_steps 1 --per_device_train_batch_size 4 --warmup_steps 0"
    assert main([*flags, *recipe.split(), "--output_dir", str(tmp_path / "out")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(flags[1]), tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("multi_modal_projector" in name for name in moved)
    assert not [name for name in moved if "vision_tower" in name]


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_predictors_alone_train_over_a_frozen_llm(flags, tmp_path, bf16):
    recipe = ["--train", "predictors", "--bf16", bf16, "--global_batch_size", "8", "--max_steps", "4"]
    recipe += [
        "--predictor_learning_rate",
        "1e-2",
        "--warmup_steps",
        "0",
        "--activation_checkpointing",
        "true",
    ]
    recipe += ["--save_strategy", "steps", "--save_steps", "4"]
    out = tmp_path / "out"
    assert main([*flags, *recipe, "--output_dir", str(out)]) == 0
    dtype = torch.bfloat16 if bf16 == "true" else torch.float32
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(flags[1]), out))
    moved = {name for name in before if not torch.equal(before[name].to(dtype), after[name])}
    assert all(any(part in name for name in moved) for part in PREDICTORS[:2])
    assert not [name for name in moved if not any(part in name for part in PREDICTORS)]
    rows = log(out)
    assert "lr_llm" not in rows[0] and rows[0]["lr_predictor"] == 1e-2 and rows[0]["grad_norm"] > 0
    # Frozen weights need no float32; what trains does, with its moments, and nothing else has any.
    within = load_file(out / "checkpoint-4" / "model.safetensors")
    for name, tensor in within.items():
        assert tensor.dtype == (torch.float32 if any(part in name for part in PREDICTORS) else dtype), name
    moments = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    trained = sum(
        tensor.numel() for name, tensor in before.items() if any(part in name for part in PREDICTORS)
    )
    assert sum(state["exp_avg"].numel() for state in moments.values()) == trained
    load_model(out, device="cpu")


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ("--gates 2:0.5,3:0.4", {"vision_keep_rate": 0.5, "later_gates": ((3, 0.4),)}),
        ("--vision_keep_rate 0.1:0.4", {"vision_keep_rate": 0.2, "vision_keep_range": (0.1, 0.4)}),
    ],
)
def test_several_gates_and_budgets_train_save_and_load(flags, tmp_path, asked, settings):
    """In any portions the same: what is drawn depends on the sample alone."""
    batch = "--global_batch_size 4 --max_steps 2 --warmup_steps 0 --optim sgd --learning_rate 0.1"
    rates = "--predictor_learning_rate 0.01 --lr_scheduler_type constant"
    for portion in ("4", "1"):
        recipe = [*asked.split(), *batch.split(), *rates.split(), "--per_device_train_batch_size", portion]
        assert main([*flags, *recipe, "--output_dir", str(tmp_path / portion)]) == 0
    for row, other in zip(log(tmp_path / "4"), log(tmp_path / "1"), strict=True):
        for name in row.keys() - MEASURED:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    model, processor = load_model(tmp_path / "4", device="cpu")
    found = model.config.sparsity.to_dict()
    found["vision_keep_rate"] = round(found["vision_keep_rate"], 6)
    assert {name: found[name] for name in settings} == settings
    weights = load_file(tmp_path / "4" / "model.safetensors")
    added = {name for name in weights if "image_predictor_3" in name or "rate_proj" in name}
    assert added and all(torch.equal(weights[name], model.state_dict()[name]) for name in added)
    inputs = processor(text=["<image>\nwhat"], images=[Image.new("RGB", (32, 32))], return_tensors="pt")
    for rate in (0.125, 0.25, 0.5):
        model.set_sparsity(vision_keep_rate=rate)
        later = int(int(rate * 16) * 0.4) or 1 if "--gates" in asked else int(rate * 16)
        assert int(model(**inputs).image_keep.sum()) == later
    assert dynllava(["convert", str(tmp_path / "4"), str(tmp_path / "p"), "--to", "published"]) == 2
    # A run goes on from there, under LoRA.
    again = ["--model_name_or_path", str(tmp_path / "4"), *flags[2:], "--max_steps", "1", *batch.split()[:2]]
    again += ["--per_device_train_batch_size", "4", *asked.split(), "--lora_rank", "2", "--warmup_steps", "0"]
    assert main([*again, "--output_dir", str(tmp_path / "again")]) == 0
    merged, _ = load_model(tmp_path / "again", device="cpu")
    assert (
        merged.config.sparsity.image_gates
        == load_model(tmp_path / "4", device="cpu")[0].config.sparsity.image_gates
    )
    assert any(not torch.equal(weights[name], merged.state_dict()[name]) for name in added)


def gradients(flags, folder, monkeypatch, *more: str) -> tuple[dict[str, torch.Tensor], list]:
    """The gradients of a run's one step before the optimiser sees them, and its batches."""
    found, batches = {}, []
    step, loss = torch.optim.SGD.step, DynamicLlavaTrainer.compute_loss

    def watch(self, *args, **kwargs):
        for name, parameter in watched["model"].named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()
        return step(self, *args, **kwargs)

    watched = {}

    def remember(self, model, inputs, *args, **kwargs):
        watched["model"] = model
        batches.append({**inputs})
        return loss(self, model, inputs, *args, **kwargs)

    recipe = "--global_batch_size 4 --per_device_train_batch_size 2 --max_steps 1 --optim sgd"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watch)
        patch.setattr(DynamicLlavaTrainer, "compute_loss", remember)
        assert main([*flags, *recipe.split(), *more, "--output_dir", str(folder)]) == 0
    return found, batches


def test_published_averaging_is_the_mean_of_the_passes_own_means(flags, tmp_path, monkeypatch):
    checkpoint = save_checkpoint(tmp_path / "sure")  # of itself, so that labels differ in their loss
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] *= 50
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    flags, single = (
        ["--model_name_or_path", str(checkpoint), *flags[2:]],
        ("--per_device_train_batch_size", "1"),
    )
    batches = gradients(flags, tmp_path / "a", monkeypatch, "--loss_average", "batches", *single)[1]
    (row,) = log(tmp_path / "a")
    means, sums, count = [], 0.0, 0
    for batch in batches:
        model, _ = load_model(flags[1], device="cpu")
        model.train()
        noise = gumbel_noise(42, 0, batch.pop("sample"), batch["input_ids"] == 4, batch["labels"])
        with torch.no_grad():
            logits = model(**batch, gumbel_noise=noise).logits[:, :-1].double()
        for_labels = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none", ignore_index=-100
        )
        labels = int((batch["labels"][:, 1:] != -100).sum())
        means.append(float(for_labels.sum()) / labels)
        sums, count = sums + float(for_labels.sum()), count + labels
    assert row["lm_loss"] == pytest.approx(sum(means) / 4, rel=1e-5)
    assert row["loss"] == pytest.approx(
        row["lm_loss"] + 100 * (row["image_keep_loss"] + row["text_keep_loss"]), rel=1e-5
    )
    gradients(flags, tmp_path / "b", monkeypatch, "--loss_average", "labels", *single)
    (other,) = log(tmp_path / "b")
    assert other["lm_loss"] == pytest.approx(sums / count, rel=1e-5)
    assert abs(sums / count - sum(means) / 4) > 1e-3  # the two differ here


def test_clipping_leaves_each_groups_scale_to_itself(flags, tmp_path, monkeypatch):
    """None by default, as published; else the LLM's gradients and the predictors', each to the norm."""
    whole, _ = gradients(flags, tmp_path / "a", monkeypatch)
    clipped, _ = gradients(flags, tmp_path / "b", monkeypatch, "--max_grad_norm", "0.01")

    def norm(values, predictors: bool) -> float:
        parts = [
            v.flatten() for n, v in values.items() if any(part in n for part in PREDICTORS) == predictors
        ]
        return float(torch.cat(parts).norm())

    for predictors in (True, False):
        assert norm(whole, predictors) > 0.02
        assert norm(clipped, predictors) == pytest.approx(0.01, rel=1e-3)
    (row,), (other,) = log(tmp_path / "a"), log(tmp_path / "b")
    assert row["grad_norm"] == pytest.approx(math.hypot(norm(whole, True), norm(whole, False)), rel=1e-4)
    assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)


def test_a_run_that_misses_its_keep_rate_says_so(flags, tmp_path, capsys):
    """Fresh predictors keep about half; a demo whose text predictor had drifted to keep everything went unnoticed."""
    flags = [*flags, "--max_steps", "1", "--global_batch_size", "8"]
    for rate, off in (("0.2", True), ("0.5", False), ("0.05:0.2", False)):
        output = tmp_path / rate.replace(":", "-")
        assert main([*flags, "--vision_keep_rate", rate, "--output_dir", str(output)]) == 0
        found = log(output)[-1]["image_keep_rate"]
        assert abs(found - 0.5) < 0.1  # else the rates above ask for nothing
        line = f"warning: image_keep_rate is {found:.2f}, not {rate}"
        assert (line in capsys.readouterr().out) == off


def test_a_run_says_nothing_of_deprecated_names(flags, tmp_path):
    flags = [*flags, "--max_steps", "1", "--global_batch_size", "8", "--activation_checkpointing", "true"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
        assert main([*flags, "--gradient_checkpointing", "true", "--output_dir", str(tmp_path / "old")]) == 0
        assert main([*flags, "--lora_rank", "2", "--output_dir", str(tmp_path / "lora")]) == 0
    assert not [str(one.message) for one in said if "deprecated" in str(one.message)]


def test_short_answers_leave_the_text_rate_alone(flags, tmp_path):
    recipe = ["--global_batch_size", "8", "--max_steps", "1", "--min_text_length", "100000"]
    assert main([*flags, *recipe, "--output_dir", str(tmp_path / "out")]) == 0
    (row,) = log(tmp_path / "out")
    assert row["text_keep_loss"] == 0 and "text_keep_rate" not in row and row["image_keep_loss"] > 0


def test_unreadable_samples_are_skipped_up_to_a_limit(flags, tmp_path, capsys):
    """Found in the run; one too many stops it behind a checkpoint, from which a larger limit goes on."""
    mixture, images = save_mixture(tmp_path / "data")
    for name in ("3.png", "5.png"):
        (images / name).write_bytes((images / name).read_bytes()[:40])
    out = tmp_path / "out"
    data = ["--data_path", str(mixture), "--image_folder", str(images), "--output_dir", str(out)]
    recipe = ["--global_batch_size", "4", "--per_device_train_batch_size", "4", "--max_steps", "3"]
    assert main([*flags, *data, *recipe]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "--skip_bad allows 0" in line and "unreadable image" in line and str(out / "skipped.jsonl") in line
    assert ("3.png" in line and "s3" in line) or ("5.png" in line and "s5" in line)
    (left,) = out.glob("checkpoint-*")
    assert f"stopped after step {left.name.split('-')[1]}, which is saved" in said.out
    assert not (out / "config.json").exists()
    assert main([*flags, *data, *recipe, "--skip_bad", "2"]) == 0
    said = capsys.readouterr().out
    assert f"going on from {left}" in said and "skipped samples: 2 (2 unreadable), see" in said
    named = (out / "skipped.jsonl").read_text()
    assert "3.png" in named and "5.png" in named


def test_a_mixture_with_bad_samples_of_eight_kinds_trains_through_and_names_them(flags, tmp_path, capsys):
    """0.05% of 16,000, as in a large mixture; the default lets twice as many pass."""
    good = conversation(("<image>\nwhat color is the shape", "red"))
    rows = [{"id": f"g{index}", "image": "0.png", "conversations": good} for index in range(16_000)]
    bad = {
        10: {"conversations": conversation(("<image>\nwhat", " "))},
        20: {"conversations": conversation(("<image>\n", "red"))},
        30: {"conversations": good[:1]},
        40: {"conversations": "what color"},
        50: {"image": ["0.png", "0.png"]},
        60: {"conversations": conversation(("<image>\nwhat", "half \ud83d"))},
        70: {"image": "gone.png"},
    }
    for row, changes in bad.items():
        rows[row] = {**rows[row], **changes, "id": f"b{row}"}
    (drawn, *_) = EpochSampler(len(rows) - len(bad), 4, 42)
    corrupt = [row for row in range(len(rows)) if row not in bad][drawn]
    rows[corrupt] = {**rows[corrupt], "image": "corrupt.png", "id": "corrupt"}
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (32, 32)).save(images / "0.png")
    (images / "corrupt.png").write_bytes((images / "0.png").read_bytes()[:40])
    mixture = tmp_path / "mix.json"
    mixture.write_text(json.dumps(rows))
    data = [
        "--data_path",
        str(mixture),
        "--image_folder",
        str(images),
        "--data_cache",
        str(tmp_path / "cache"),
    ]
    recipe = ["--global_batch_size", "4", "--per_device_train_batch_size", "4", "--max_steps", "2"]
    out = tmp_path / "out"
    assert main([*flags, *data, *recipe, "--output_dir", str(out), "--skip_bad", "6"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "7 of 16000 samples can't be trained on, --skip_bad 6 allows 6: " in line and "gone.png" in line
    assert not out.exists()
    assert main([*flags, *data, *recipe, "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "15993 samples (0 text-only left out, 7 bad ones skipped, see" in said
    assert "skipped samples: 8 (6 malformed, 1 missing image, 1 unreadable), see" in said
    entries = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {entry["sample"] for entry in entries} == {*bad, corrupt}
    reasons = {entry["sample"]: entry["reason"] for entry in entries}
    for row, why in {10: "empty answer", 20: "empty question", 30: "alternate", 40: "'conversations'",
                     50: "2 images", 60: "half of a character", 70: "gone.png is missing",
                     corrupt: "unreadable image"}.items():  # fmt: skip
        assert why in reasons[row] and f"(id '{rows[row]['id']}')" in reasons[row]
    many = [
        f"x.json: sample {n} (id 'a{n}'): reason {kind}"
        for kind in "abcdefghijkl"
        for n in range(ord(kind) - 96)
    ]
    shown = most_frequent(many)
    assert shown.startswith("12 x x.json: sample 0 (id 'a0'): reason l; 11 x ") and shown.endswith(
        "and 2 other reasons"
    )
    assert shown.count(";") == 10


def test_a_mixture_that_moved_is_the_same_data(flags, tmp_path, capsys):
    """With bad samples in it, too, whose reasons name the file."""
    mixture, images = save_mixture(tmp_path / "data")
    rows = json.loads(mixture.read_text())
    rows[2]["conversations"] = rows[2]["conversations"][:1]
    mixture.write_text(json.dumps(rows))
    rest = ["--image_folder", str(images), "--output_dir", str(tmp_path / "out"), "--skip_bad", "1"]
    rest += ["--max_steps", "1", "--global_batch_size", "4", "--per_device_train_batch_size", "4"]
    assert main([*flags, "--data_path", str(mixture), *rest]) == 0
    moved = mixture.rename(tmp_path / "moved.json")
    assert main([*flags, "--data_path", str(moved), *rest]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("average", ["labels", "batches"])
def test_a_step_without_any_label_trains_the_image_predictor(flags, tmp_path, average):
    """As LLaVA does with a sample that it can't split into rounds: a loss of 0 / 0 ended the run."""
    mixture, images = save_mixture(tmp_path / "data", samples=1)
    mixture.write_text(mixture.read_text().replace('"red"', '"re</s>d"'))
    recipe = ["--max_steps", "1", "--global_batch_size", "1", "--per_device_train_batch_size", "1"]
    recipe += ["--loss_average", average, "--data_path", str(mixture), "--image_folder", str(images)]
    assert main([*flags, *recipe, "--output_dir", str(tmp_path / "out")]) == 0
    (row,) = log(tmp_path / "out")
    assert row["lm_loss"] == row["text_keep_loss"] == 0
    assert row["loss"] == pytest.approx(100 * row["image_keep_loss"]) and row["grad_norm"] > 0


def test_overlong_samples_lose_text_but_never_image_tokens(flags, tmp_path, capsys):
    recipe = ["--global_batch_size", "8", "--max_steps", "1"]
    out = tmp_path / "out"
    assert main([*flags, *recipe, "--output_dir", str(out), "--model_max_length", "200"]) == 0
    assert "skipped" not in capsys.readouterr().out  # cut behind their first answer
    strict = [*flags, *recipe, "--output_dir", str(tmp_path / "short"), "--model_max_length", "40"]
    assert main([*strict, "--strict"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "over --model_max_length 40" in error and "(id 's" in error


def test_log_says_how_fast_and_how_far(two_steps):
    rows, _ = two_steps["4"]
    for left, row in zip((1, 0), rows, strict=True):
        assert row["tokens_per_second"] > row["samples_per_second"] > 0 and row["peak_memory_gib"] > 0.1
        seconds = 4 / row["samples_per_second"]  # a step has 4 samples
        assert row["hours_left"] == pytest.approx(left * seconds / 3600, rel=1e-3)
        assert row["image_keep_rate_std"] >= 0 and row["text_keep_rate_std"] >= 0
