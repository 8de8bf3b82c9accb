"""Stock and own checkpoint folders of every family: load_model, save_pretrained, Auto classes, the pipeline, and what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

from dynllava_plugin import DynamicLlavaForConditionalGeneration, load_model
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints import check_settings
from dynllava_plugin.model.families import FAMILIES as CLASSES
from tests.families.checkpoints import EVERY, conversation, picture, sample_batch, write_checkpoint

SIZES, QUESTIONS = [[(56, 84)], [(28, 28)], []], ["What color is the shape?", "How many?", "Yes or no?"]
every_family = pytest.mark.parametrize("family", EVERY)


@every_family
@torch.no_grad()
def test_a_stock_folder_loads_and_what_is_saved_loads_again(family, tmp_path, caplog):
    stock = write_checkpoint(family, tmp_path / "stock")
    with caplog.at_level(logging.WARNING):
        model, processor = load_model(stock, device="cpu")
    assert "has no predictors: fresh, untrained ones stand in" in caplog.text
    assert type(model) is CLASSES[model.config.model_type.removeprefix("dynamic_")] and not model.training
    batch = sample_batch(family, AutoProcessor.from_pretrained(stock), SIZES, QUESTIONS)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    caplog.clear()
    again, processor = load_model(tmp_path / "own", device="cpu")
    assert not caplog.text and processor.tokenizer.padding_side == "left"
    assert torch.equal(again(**batch).logits, expected)
    for kind in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto = kind.from_pretrained(tmp_path / "own").eval()
        assert type(auto) is type(model) and torch.equal(auto(**batch).logits, expected)
        assert model.fresh_predictors and not again.fresh_predictors and not auto.fresh_predictors
    reader = pipeline("image-text-to-text", model=str(tmp_path / "own"), device="cpu")
    turns = conversation("What color is the shape?", 1)
    turns[0]["content"][0]["image"] = picture((56, 84), 0)
    answer = reader(text=turns, max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


@every_family
@torch.no_grad()
def test_our_class_reads_a_stock_folder_as_it_is(family, tmp_path):
    """Not a random LLM with a warning."""
    stock = write_checkpoint(family, tmp_path)
    expected = AutoModelForImageTextToText.from_pretrained(stock).eval()
    kind = CLASSES[expected.config.model_type]
    model, report = kind.from_pretrained(stock, output_loading_info=True)
    assert all("predictor" in name for name in report["missing_keys"]) and not report["unexpected_keys"]
    assert model.fresh_predictors
    model.eval().set_sparsity(mode="full")
    batch = sample_batch(family, AutoProcessor.from_pretrained(stock), SIZES[:1], QUESTIONS[:1])
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=1e-5, atol=1e-5)


def changed(folder, **values):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in values.items():
        part, _, name = key.rpartition("__")
        (config[part] if part else config)[name] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported: image tokens attend both ways"),
        ({"model_type": "smolvlm"}, "model_type 'smolvlm' is not supported: its generation has a cache of its own"),
        ({"model_type": "blip_3"}, "model_type 'blip_3' is not a layout or a family this package reads"),
        ({"text_config__model_type": "gpt2"}, "the LLM is a gpt2, supported are llama, mistral, qwen2"),
        ({"text_config__sliding_window": 16}, "sliding_window: 16: layers that see a part of the context only"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(values, message, tmp_path):
    write_checkpoint("mistral3", tmp_path)
    changed(tmp_path, **values)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "weights do not fit the model: 1 missing"),
        (lambda tensors, name: tensors.update(extra=torch.ones(1)), r"1 not part of the model \(extra\)"),
        (
            lambda tensors, name: tensors.update({name: tensors[name][:1].clone()}),
            r"has shape \[1, .*\], but",
        ),
    ],
)
def test_weights_that_do_not_fit(edit, message, tmp_path):
    write_checkpoint("qwen3_vl", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors, next(name for name in tensors if "mlp.up_proj" in name and "language_model" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_model(tmp_path, device="cpu")


def test_settings_are_checked_before_weights_are_read(tmp_path):
    write_checkpoint("qwen2_5_vl", tmp_path)
    check_settings(tmp_path, attn_implementation="eager", policy="fastv")
    with pytest.raises(UserError, match="attn_implementation"):
        check_settings(tmp_path, attn_implementation="none_such")
    with pytest.raises(UserError, match="layer 9 is outside the model"):
        check_settings(tmp_path, policy="fastv,k=9")


def test_a_truncated_file(tmp_path):
    write_checkpoint("qwen2_5_vl", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load_model(tmp_path, device="cpu")


def test_a_class_refuses_another_family(tmp_path):
    write_checkpoint("qwen2_5_vl", tmp_path)
    with pytest.raises(UserError, match="model_type 'qwen2_5_vl' is not of DynamicLlavaConfig"):
        DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path)
