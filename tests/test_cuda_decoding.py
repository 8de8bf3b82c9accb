"""Decoding on a GPU: no step waits for the host, and captured or compiled steps compute what the plain ones do."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import CompileConfig

from dynllava_plugin.model.static_decoding import StaticCache
from tests.tiny_random import batch_of, random_model, random_sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

STEPS = 40


@pytest.fixture(scope="module")
def model():
    return random_model(mode="image_text").cuda()


@pytest.fixture(scope="module")
def batch():
    rng = random.Random(0)
    samples = [random_sample(rng, images, text) for images, text in ((1, 3), (2, 8), (0, 5))]
    return {name: tensor.cuda() for name, tensor in batch_of(samples).items()}


@pytest.fixture(scope="module")
def answers():
    return torch.randint(3, 80, (3, STEPS), generator=torch.Generator().manual_seed(0)).cuda()


def decode(model, batch, answers, cache):
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        steps = [model(answers[:, t : t + 1], past_key_values=cache).logits for t in range(answers.shape[1])]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_decode_step_never_waits_for_the_device(model, batch, answers, implementation):
    cache = model.new_cache(implementation)
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
        for column in range(3):  # the first static step captures
            model(answers[:, column : column + 1], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for column in range(3, STEPS):
                out = model(answers[:, column : column + 1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert out.logits.isfinite().all() and cache.output_keep().shape == (3, STEPS)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(None, id="graphs"),
        pytest.param({"backend": "aot_eager", "fullgraph": True}, id="compiled and graphs"),
        pytest.param({"fullgraph": True}, id="inductor and graphs"),
        pytest.param({"mode": "reduce-overhead", "fullgraph": True}, id="reduce-overhead"),
    ],
)
def test_static_steps_equal_plain_ones(model, batch, answers, options):
    torch._dynamo.reset()
    plain, static = (
        model.new_cache(),
        StaticCache(5, model._llm.policy.splits, growth_step=16, compile_options=options),
    )
    expected = decode(model, batch, answers, plain)
    torch.testing.assert_close(decode(model, batch, answers, static), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(static.kept_lengths(), plain.kept_lengths())
    assert torch.equal(static.output_keep(), plain.output_keep())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("compiling", [None, CompileConfig(mode="reduce-overhead", fullgraph=True)])
def test_generate_with_a_static_cache(model, batch, options, compiling):
    torch._dynamo.reset()
    extra = {"cache_implementation": "static", "compile_config": compiling}
    outputs = [
        model.generate(**batch, **options, do_sample=False, max_new_tokens=30, min_new_tokens=30, **kwargs)
        for kwargs in ({}, extra)
    ]
    assert torch.equal(*outputs)


def test_gpu_equals_cpu(model, batch, answers):
    expected = decode(
        random_model(mode="image_text"), {k: v.cpu() for k, v in batch.items()}, answers.cpu(), model.new_cache()
    )  # fmt: skip
    found = decode(model, batch, answers, model.new_cache("static"))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
