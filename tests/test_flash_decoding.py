"""The step through flash-attention's KV-cache kernel against the masked one; the kernel's contract is written out here."""

from __future__ import annotations

import random

import pytest
import torch

from dynllava_plugin.model import attention as module
from dynllava_plugin.model.attention import flash_step
from tests.tiny_random import batch_of, random_model, random_sample

CALLS = []


def contract(q, k_cache, v_cache, *, cache_seqlens, softmax_scale):
    """`flash_attn_with_kvcache` as documented: [B, 1, H, D] queries, [B, S, H_kv, D] caches, the first cache_seqlens slots count."""
    assert cache_seqlens.dtype == torch.int32 and q.dtype in (torch.float16, torch.bfloat16)
    assert k_cache.stride(-1) == 1 and q.shape[1] == 1
    CALLS.append(cache_seqlens.tolist())
    groups = q.shape[2] // k_cache.shape[2]
    out = torch.empty_like(q)
    for sample, held in enumerate(cache_seqlens.tolist()):
        keys = k_cache[sample, :held].float().repeat_interleave(groups, 1)
        values = v_cache[sample, :held].float().repeat_interleave(groups, 1)
        weights = torch.einsum("hd,shd->hs", q[sample, 0].float(), keys).mul(softmax_scale).softmax(-1)
        out[sample, 0] = torch.einsum("hs,shd->hd", weights, values).to(q.dtype)
    return out


@pytest.fixture
def kernel(monkeypatch):
    CALLS.clear()
    monkeypatch.setattr(module, "_kernel", lambda: contract)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_flash_steps_equal_masked_ones(kernel, implementation):
    # Output tokens by chance: a learned decision on the brink is another matter than the kernel's rounding.
    model, rng = random_model(policy="image+random_text").to(torch.bfloat16), random.Random(0)
    batch = batch_of([random_sample(rng, images, text) for images, text in ((1, 3), (0, 9), (2, 2))])
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    answers = torch.randint(3, 80, (3, 10), generator=torch.Generator().manual_seed(0))
    found = {}
    for attention in ("sdpa", "flash_attention_2"):
        cache = model.new_cache(implementation)
        model.config.text_config._attn_implementation = "sdpa"
        with torch.no_grad():
            model(**batch, past_key_values=cache, use_cache=True)
            model.config.text_config._attn_implementation = attention
            steps = [model(answers[:, t : t + 1], past_key_values=cache).logits for t in range(10)]
        found[attention] = torch.cat(steps, 1).float(), cache.kept_lengths()
    assert len(CALLS) == 10 * 5, "every layer of every step goes through the kernel"
    assert torch.equal(found["sdpa"][1], found["flash_attention_2"][1])
    assert (found["sdpa"][1][-1] < found["sdpa"][1][0]).all()
    torch.testing.assert_close(found["sdpa"][0], found["flash_attention_2"][0], rtol=0.05, atol=0.15)


def test_without_the_package_the_masked_step_runs():
    query = torch.zeros(2, 4, 1, 8, dtype=torch.bfloat16)
    keys = torch.zeros(2, 2, 5, 8, dtype=torch.bfloat16)
    if module._kernel() is None:
        assert flash_step(query, keys, keys, torch.tensor([1, 2]), 1.0) is None


def test_what_the_kernel_does_not_take_goes_the_other_way(kernel):
    keys = torch.zeros(2, 2, 5, 8)
    assert flash_step(torch.zeros(2, 4, 1, 8), keys, keys, torch.tensor([1, 2]), 1.0) is None  # float32
    half = keys.to(torch.bfloat16)
    assert flash_step(torch.zeros(2, 4, 3, 8).to(half), half, half, None, 1.0) is None  # a prefill or chunk
    assert not CALLS


@pytest.mark.skipif(
    not torch.cuda.is_available() or module._kernel() is None,
    reason="needs a CUDA GPU and flash-attn",
)
def test_the_real_kernel_keeps_the_contract():
    generator = torch.Generator(device="cuda").manual_seed(0)
    query = torch.randn(3, 4, 1, 64, generator=generator, device="cuda").to(torch.bfloat16)
    keys, values = torch.randn(2, 3, 2, 40, 64, generator=generator, device="cuda").to(torch.bfloat16)
    slots = torch.tensor([0, 17, 39], device="cuda")
    found = flash_step(query, keys, values, slots, 0.125)
    expected = contract(
        query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2),
        cache_seqlens=(slots + 1).to(torch.int32), softmax_scale=0.125,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
