"""What a call costs the host, counted and not timed: beside the stock model of the same shape, 32 layers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dynllava_plugin import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from tests.op_counts import counted

TEXT = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
SHELL = dict(
    vision_config=dict(
        model_type="clip_vision_model", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=7, intermediate_size=32, projection_dim=16,
    ),
    image_token_index=90,
    image_seq_length=16,
)  # fmt: skip
PREDICTORS = dict(vision_keep_rate=0.3, predictor_dim=32, predictor_heads=4, predictor_ffn_dim=64)


@pytest.fixture(scope="module")
def models():
    stock = LlavaConfig(text_config=dict(model_type="llama", **TEXT), **SHELL)
    ours = DynamicLlavaConfig(
        text_config=dict(model_type="dynamic_llama", sparsity=PREDICTORS, **TEXT), **SHELL
    )
    return (
        LlavaForConditionalGeneration(stock).eval(),
        DynamicLlavaForConditionalGeneration(ours).eval(),
    )


def counts(model, batch):
    """(ops, host reads) of a prefill and of a later decode step, for prompts of two lengths where `batch` is 2."""
    ids = torch.tensor([[3, 4, 1, *[90] * 16, 5, 6, 7]] * batch)
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    pixels, token = torch.zeros(batch, 3, 28, 28), torch.full((batch, 1), 7)
    with counted() as prefill:
        out = model(ids, attention_mask=mask, pixel_values=pixels, use_cache=True, logits_to_keep=1)
    for _ in range(2):
        mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        with counted() as step:
            model(token, attention_mask=mask, past_key_values=out.past_key_values, logits_to_keep=1)
    return (prefill.ops, prefill.reads), (step.ops, step.reads)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("policy", ["full", "image", "image_text", "fastv,k=3", "random", "divprune"])
def test_a_call_asks_no_more_of_the_host_than_the_stock_model(models, policy, batch):
    stock, ours = models
    ours.set_sparsity(policy=policy)
    (prefill, prefill_reads), (step, step_reads) = counts(ours, batch)
    (stock_prefill, _), (stock_step, _) = counts(stock, batch)
    assert prefill_reads <= (3 if policy != "random" else 3 + batch) and step_reads <= 1
    # The gate's own work, predictor and packing included; a policy's loop over tokens is its own.
    assert policy == "divprune" or prefill <= stock_prefill + 150
    assert step <= stock_step + 35
