"""`load_model(quantization=)`: fewer bits in the LLM, predictors and output matrix as they are, near the same logits."""

from __future__ import annotations

import pytest
import torch

from dynllava_plugin import load_model
from dynllava_plugin.errors import UserError
from tests.families.checkpoints import sample_batch, stock_model, stock_processor, write_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")
LAYERS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


def batch_of(family):
    return sample_batch(family, stock_processor(family), [[(56, 84)]], ["What color is the shape?"])


@pytest.mark.parametrize("bits", LAYERS)
@pytest.mark.parametrize("family", ["llava_llama", "qwen2_5_vl"])
def test_fewer_bits(family, bits, tmp_path):
    stock_model(family, intermediate_size=128).save_pretrained(tmp_path)  # four bits come in blocks of 64
    stock_processor(family).save_pretrained(tmp_path)
    predictors = {"mode": "full", "later_gates": ((3, 0.5),), "prompt_predictor": True}
    plain, _ = load_model(tmp_path, device="cpu", **predictors)
    model, _ = load_model(tmp_path, device="cpu", quantization=bits, **predictors)
    quantised = {name for name, part in model.named_modules() if type(part).__name__ == LAYERS[bits]}
    llm = model.model.language_model
    assert sum("language_model.layers" in name for name in quantised) == 4 * 7
    assert not any("predictor" in name or "lm_head" in name for name in quantised)
    for own, expected in zip(
        llm.text_predictor.parameters(), plain._llm.text_predictor.parameters(), strict=True
    ):
        assert own.dtype == expected.dtype
    batch = batch_of(family)
    with torch.no_grad():
        exact, near = plain(**batch).logits, model(**batch).logits
    error = (near.float() - exact.float()).norm() / exact.float().norm()
    assert 1e-6 < error < (0.1 if bits == "8bit" else 0.6)  # of random weights
    model.set_sparsity(mode="image_text")
    model.generate(**batch, max_new_tokens=3)


def test_another_name_is_refused(tmp_path):
    write_checkpoint("qwen2_5_vl", tmp_path)
    with pytest.raises(UserError, match="quantization: '3bit' is not one of 8bit, 4bit"):
        load_model(tmp_path, quantization="3bit")
