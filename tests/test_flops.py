"""The cost model: the paper's Table 10, and the exact count against PyTorch's own counter."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dynllava_plugin.flops import (
    Context,
    DecoderShape,
    cache_bytes,
    decode_step_flops,
    paper_prefill_flops,
    prefill_flops,
    uncached_step_flops,
)
from tests.tiny_random import TOKENS_PER_IMAGE, batch_of, random_model, random_sample

LLM = {
    "7B": DecoderShape(32, 4096, 11008, 32, 32, 32000),
    "13B": DecoderShape(40, 5120, 13824, 40, 40, 32000),
}


@pytest.mark.parametrize(
    ("llm", "split", "kept", "teraflops"),
    [
        ("7B", 32, 576, "10.1"), ("7B", 2, 115, "2.5"), ("7B", 3, 144, "3.2"),
        ("13B", 40, 576, "19.6"), ("13B", 2, 115, "4.7"), ("13B", 3, 144, "6.0"),
    ],
)  # fmt: skip
def test_table_10_to_its_printed_digits(llm, split, kept, teraflops):
    flops = paper_prefill_flops(LLM[llm], Context(split, 576, kept, text=0))
    assert f"{flops / 1e12:.1f}" == teraflops


def test_parameters_of_vicuna_7b():
    assert LLM["7B"].parameters / 1e9 == pytest.approx(6.74, abs=0.02)


def tiny(mode):
    model = random_model(mode=mode, kv_heads=4).eval()
    sparsity = model.config.sparsity
    kept = int(0.3 * TOKENS_PER_IMAGE) if mode != "full" else TOKENS_PER_IMAGE
    context = Context(
        sparsity.sparse_layer if mode != "full" else 5, TOKENS_PER_IMAGE, kept, text=6,
        image_predictor=mode != "full", text_predictor=mode == "image_text",
    )  # fmt: skip
    return model, DecoderShape.of(model.config.text_config), context


def counted_by_pytorch(call):
    """FLOPs of `call()`; the counter knows attention as two matrix products only."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return counter.get_total_flops()


def all_pairs(shape, counts):
    """PyTorch's counter takes every pair of an attention call, the exact count the causal ones: the difference."""
    return sum(4 * shape.hidden * (n * n - n * (n + 1) / 2) for n in counts)


@pytest.mark.parametrize("mode", ["full", "image", "image_text"])
def test_exact_prefill_is_what_pytorch_counts(mode):
    model, shape, context = tiny(mode)
    sample = random_sample(random.Random(0), 1, 60)
    sample.ids = [1, *sample.ids[-5:-1], *[90] * TOKENS_PER_IMAGE, sample.ids[-1]]
    batch = batch_of([sample])
    images = model.model.get_image_features(batch.pop("pixel_values"), return_dict=True)
    counted = counted_by_pytorch(
        lambda: model(**batch, mm_encoder_outputs={"image": images}, logits_to_keep=1)
    )
    tokens = [context.prompt] * context.split + [int(context.kept(0))] * (shape.layers - context.split)
    assert counted == prefill_flops(shape, context) + all_pairs(shape, tokens)


def test_exact_decode_step_is_what_pytorch_counts():
    model, shape, context = tiny("image_text")
    batch = batch_of([random_sample(random.Random(1), 1, 5)])
    with torch.no_grad():
        out = model(**batch, use_cache=True, logits_to_keep=1)
    lengths = out.past_key_values.kept_lengths()[:, 0]
    context = Context(2, int(lengths[0]), int(lengths[2]), 0, text_keep=1.0, text_predictor=True)
    token = torch.tensor([[7]])
    counted = counted_by_pytorch(lambda: model(token, past_key_values=out.past_key_values, logits_to_keep=1))
    assert counted == decode_step_flops(shape, context, 0)


@given(
    st.integers(1, 600), st.integers(0, 100), st.floats(0.05, 1), st.floats(0, 1), st.integers(0, 3000),
    st.integers(1, 9),
)  # fmt: skip
def test_less_context_never_costs_more(images, text, rate, text_keep, generated, batch):
    shape = LLM["7B"]
    full = Context(shape.layers, images, images, text)
    less = Context(2, images, max(1, int(rate * images)), text, text_keep)
    for cost in (
        prefill_flops(shape, full, batch) - prefill_flops(shape, less, batch),
        uncached_step_flops(shape, full, generated, batch) - uncached_step_flops(shape, less, generated, batch),
        decode_step_flops(shape, full, generated, batch) - decode_step_flops(shape, less, generated, batch),
        cache_bytes(shape, full, generated, 2, batch) - cache_bytes(shape, less, generated, 2, batch),
    ):  # fmt: skip
        assert cost >= -1e-3
    everything = Context(2, images, images, text)
    assert prefill_flops(shape, everything, batch) == pytest.approx(prefill_flops(shape, full, batch))


def test_a_cached_token_costs_what_the_uncached_step_adds():
    """Without any dropping, sum of decode steps = difference of whole passes (logits aside)."""
    shape, context = LLM["7B"], Context(32, 576, 576, 60)
    logits = 2 * shape.hidden * shape.vocab
    steps = sum(decode_step_flops(shape, context, t) - logits for t in range(10))
    whole = uncached_step_flops(shape, context, 10) - prefill_flops(shape, context)
    assert steps == pytest.approx(whole)
