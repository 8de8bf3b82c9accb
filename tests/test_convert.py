"""`dynllava convert` and the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dynllava_plugin import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, load_model
from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints import load_without_processor
from dynllava_plugin.model.checkpoints.converting import convert, published_name
from dynllava_plugin.model.checkpoints.weights import IGNORED
from tests.families.checkpoints import write_checkpoint
from tests.golden_case import CASES, GOLDEN
from tests.tiny_random import random_model
from tests.training_kit import save_checkpoint


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("case", CASES)
def test_published_weights_come_back_to_the_bit(case, tmp_path, capsys):
    """What the golden cases prove equal to the published code is written as that code wrote it."""
    source = GOLDEN / case / "checkpoint"
    assert main(["convert", str(source), str(tmp_path / "own"), "--to", "dynamic"]) == 0
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--to", "published"]) == 0
    assert "no tokenizer" in capsys.readouterr().out
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    before = {name: tensor for name, tensor in before.items() if not IGNORED.search(name)}
    same(before, after)
    old = json.loads((source / "config.json").read_text())
    new = json.loads((tmp_path / "back" / "config.json").read_text())
    meant = {**new["sparse_config"], "mm_vision_tower": new["mm_vision_tower"]}
    for name, value in {**new, **new["sparse_config"]}.items():
        if name not in ("model_type", "mm_vision_tower", "sparse_config"):
            assert old["sparse_config"].get(name, old.get(name)) == value, name
    assert meant["mm_vision_tower"] == "clip" and (tmp_path / "back" / "clip" / "config.json").exists()
    same(load_without_processor(source).state_dict(), load_without_processor(tmp_path / "back").state_dict())


def test_our_checkpoint_survives_the_published_layout(tmp_path, capsys):
    source = save_checkpoint(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "published"), "--to", "published"]) == 0
    assert "tokenizer.model" in capsys.readouterr().out  # the published code asks for it
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "own")]) == 0
    (model, processor), (again, reader) = load_model(source), load_model(tmp_path / "own")
    same(model.state_dict(), again.state_dict())
    assert model.config.sparsity == again.config.sparsity
    text = ["USER: <image>\nwhat color ASSISTANT: red</s>"]
    pictures = [Image.new("RGB", (20, 30), (250, 3, 90))]
    one, other = (ready(images=pictures, text=text, return_tensors="pt") for ready in (processor, reader))
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_every_parameter_has_a_published_name():
    model = load_without_processor(GOLDEN / "gqa" / "checkpoint")
    names = [published_name(name) for name in model.state_dict()]
    assert len(set(names)) == len(names) and not any("language_model" in name for name in names)


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("qwen2_5_vl", {}, "a qwen2_5_vl"),
        ("llava", {"model_type": "mistral", "sliding_window": None}, "an LLM that is a mistral"),
        ("llava", {"head_dim": 4}, "an LLM with a head_dim of its own"),
    ],
)
def test_a_model_without_a_place_in_the_published_layout(family, changes, what, tmp_path, capsys):
    if family == "llava":
        config = random_model().config.to_dict()
        config["text_config"] |= {"model_type": "llama", **changes}
        config = DynamicLlavaConfig.from_dict(config)
        DynamicLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    else:
        write_checkpoint(family, tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--to", "published"]) == 2
    assert f"error: --to published: {what}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_target_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main(["convert", "tiny", str(tmp_path / "full")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists() and len(list(tmp_path.iterdir())) == 1


def test_card_holds_recipe_and_results(tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "my-dynamic-llava")
    run = {"learning_rate": 5e-6, "global_batch_size": 64, "model_name_or_path": "liuhaotian/llava-v1.5-7b"}
    (folder / "run.json").write_text(json.dumps({"finished": True, "arguments": run}))
    results = tmp_path / "results" / "lmms-eval" / "a"
    results.mkdir(parents=True)
    assert main(["push", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: liuhaotian/llava-v1.5-7b\nlibrary_name: transformers\n")
    assert "base_model: liuhaotian/llava-v1.5-7b" in card and "# my-dynamic-llava" in card
    assert "| `learning_rate` | 5e-06 |" in card and "| image tokens kept | 0.2 |" in card
    assert "Not measured." in card
    assert "\nA LLaVA-1.5 as a [Dynamic-LLaVA]" in card
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "dynamic_qwen3_vl"}))
    assert main(["push", str(folder)]) == 0
    assert "\nA qwen3_vl as a [Dynamic-LLaVA]" in (folder / "README.md").read_text()
    assert main(["push", str(tmp_path / "results")]) == 2


def test_push_uploads_the_model_and_nothing_else(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            return f"https://example.org/{name}"

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            calls.append(
                sorted(
                    path.name
                    for path in huggingface_hub.utils.filter_repo_objects(
                        [path for path in folder_path.rglob("*") if path.is_file()],
                        allow_patterns=allow_patterns,
                        key=lambda path: path.relative_to(folder_path).as_posix(),
                    )
                )
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    folder = save_checkpoint(tmp_path / "model")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "skipped.jsonl").touch()
    assert main(["push", str(folder), "someone/model"]) == 0
    assert "https://example.org/someone/model" in capsys.readouterr().out
    (uploaded,) = calls
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded)
    assert "training_args.bin" not in uploaded and "skipped.jsonl" not in uploaded


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model, processor = load_model("tiny", device="cpu")
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    model.get_parameter(name).data[5, 7] = float("nan")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "damaged")
    with pytest.raises(UserError, match=f"damaged: {name} holds numbers that are not finite"):
        convert(tmp_path / "damaged", tmp_path / "out", "dynamic")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
