"""The model around read tensors against transformers' own loader: same weights, same computed buffers, same names when saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynllava_plugin import DynamicLlavaForConditionalGeneration
from dynllava_plugin.model.checkpoints.building import build
from tests.tiny_random import random_model


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def pair(request):
    """(by transformers, by us) from the same tensors, without predictors and one vision layer."""
    source = random_model()
    tensors = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if "_predictor." not in name and "vision_tower.encoder.layers.1." not in name
    }
    torch.manual_seed(0)
    theirs = DynamicLlavaForConditionalGeneration.from_pretrained(
        None, config=source.config, state_dict=dict(tensors), dtype=request.param
    )
    torch.manual_seed(0)
    ours = build(Path("here"), source.config, dict(tensors), request.param, may_be_absent=lambda name: True)
    return tensors, theirs, ours


def test_loaded_weights_and_computed_buffers_are_the_same(pair):
    tensors, theirs, ours = pair
    assert not any(tensor.device.type == "meta" for tensor in [*ours.parameters(), *ours.buffers()])
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    for name in found:
        assert found[name].dtype == expected[name].dtype and found[name].shape == expected[name].shape
        if name in tensors:
            assert torch.equal(found[name], expected[name]), name
    buffers = dict(theirs.named_buffers())
    assert buffers and set(buffers) == {name for name, _ in ours.named_buffers()}
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype, name
    assert all(
        a.requires_grad == b.requires_grad
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)
    )


def test_missing_weights_are_drawn_alike(pair):
    tensors, theirs, ours = pair
    expected, found = theirs.state_dict(), ours.state_dict()
    drawn = [name for name in found if name not in tensors]
    assert any("image_predictor" in name for name in drawn) and any("vision_tower" in name for name in drawn)
    for name in drawn:
        a, b = expected[name].float(), found[name].float()
        assert torch.isfinite(b).all()
        if a.numel() > 500:
            assert float(b.std()) == pytest.approx(float(a.std()), rel=0.25, abs=1e-6), name
            assert float(b.mean()) == pytest.approx(float(a.mean()), abs=0.01), name
        elif a.unique().numel() == 1:  # biases, norms
            assert torch.equal(a, b), name


def test_saved_names_are_the_loaded_ones(pair, tmp_path):
    _, theirs, ours = pair
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    names = [set(load_file(tmp_path / who / "model.safetensors")) for who in ("theirs", "ours")]
    assert names[0] == names[1]


def test_weights_are_mapped_not_copied(tmp_path):
    random_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = build(tmp_path, random_model().config, _ours(tensors), torch.float32)
    first = model.model.language_model.embed_tokens.weight
    assert first.data_ptr() in {tensor.data_ptr() for tensor in tensors.values()}


def _ours(tensors):
    from dynllava_plugin.model.checkpoints.weights import our_name

    return {our_name(name): tensor for name, tensor in tensors.items()}
