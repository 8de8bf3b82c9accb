"""The static path against the plain one: same logits, decisions, lengths and text, compiled or not."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CompileConfig

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.static_decoding import StaticCache
from tests.property_tests import examples
from tests.tiny_random import batch_of, random_model, random_sample

CLOSE = dict(rtol=1e-4, atol=1e-4)
MODELS = {mode: random_model(mode=mode) for mode in ("full", "image", "image_text")}
shapes_strategy = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=4)


def mixed_batch(seed, shapes):
    rng = random.Random(seed)
    return batch_of([random_sample(rng, images, text) for images, text in shapes])


def decode(model, batch, answers, cache, with_mask=True):
    """[B, T, V] logits of answer tokens fed one by one behind `cache`."""
    mask = batch["attention_mask"]
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = []
        for column in range(answers.shape[1]):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(
                answers[:, column : column + 1],
                attention_mask=mask if with_mask else None,
                past_key_values=cache,
                logits_to_keep=1,
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def assert_same(model, batch, answers, static, **options):
    dynamic = model.new_cache()
    expected = decode(model, batch, answers, dynamic)
    torch.testing.assert_close(decode(model, batch, answers, static, **options), expected, **CLOSE)
    assert torch.equal(static.kept_lengths(), dynamic.kept_lengths())
    assert torch.equal(static.output_keep(), dynamic.output_keep())
    assert static.get_seq_length() == dynamic.get_seq_length()


@pytest.mark.parametrize("mode", MODELS)
@examples(15)
@given(seed=st.integers(0, 2**20), shapes=shapes_strategy, growth=st.integers(1, 20), with_mask=st.booleans())
def test_static_equals_dynamic(mode, seed, shapes, growth, with_mask):
    """Any batch, and buffers that grow while decoding."""
    batch = mixed_batch(seed, shapes)
    answers = torch.randint(3, 80, (len(shapes), 12), generator=torch.Generator().manual_seed(seed))
    assert_same(
        MODELS[mode],
        batch,
        answers,
        StaticCache(5, MODELS[mode]._llm.policy.splits, growth_step=growth),
        with_mask=with_mask,
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_plain(backend):
    torch._dynamo.reset()
    model, batch = MODELS["image_text"], mixed_batch(3, [(1, 4), (0, 7), (2, 2)])
    answers = torch.randint(3, 80, (3, 12), generator=torch.Generator().manual_seed(0))
    options = {"backend": backend, "fullgraph": True}
    assert_same(
        model,
        batch,
        answers,
        StaticCache(5, model._llm.policy.splits, growth_step=8, compile_options=options),
    )


def test_a_compiled_step_serves_every_token_between_growths():
    torch._dynamo.reset()
    compiled = []

    def counting(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    model, batch = MODELS["image_text"], mixed_batch(4, [(1, 4), (0, 7)])
    answers = torch.randint(3, 80, (2, 30), generator=torch.Generator().manual_seed(0))
    decode(
        model, batch, answers, StaticCache(5, (2,), growth_step=40, compile_options={"backend": counting, "fullgraph": True})
    )  # fmt: skip
    assert len(compiled) == 1


COMPILED = {"compile_config": CompileConfig(backend="aot_eager", mode=None, fullgraph=True)}


@pytest.mark.parametrize(
    ("options", "static"),
    [({}, {}), ({}, COMPILED), ({"num_beams": 3}, {}), ({"num_return_sequences": 2, "do_sample": True}, {})],
)
def test_generate_with_a_static_cache(options, static):
    model, batch = MODELS["image_text"], mixed_batch(5, [(1, 3), (2, 8), (0, 5)])
    outputs = []
    for extra in ({}, {"cache_implementation": "static", **static}):
        torch.manual_seed(0)
        outputs.append(model.generate(**batch, **{"do_sample": False, **options}, max_new_tokens=20, **extra))
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] > batch["input_ids"].shape[1] + 3


def test_other_cache_implementations_are_refused():
    with pytest.raises(UserError, match="cache_implementation: 'quantized' is not one of dynamic, static"):
        MODELS["image_text"].generate(
            torch.tensor([[1, 5, 6]]), cache_implementation="quantized", max_new_tokens=2
        )


def test_settings_changed_between_steps_take_effect():
    model, batch = random_model(mode="image_text"), mixed_batch(6, [(1, 4)])
    cache = model.new_cache("static")
    token = torch.tensor([[9]])
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
        for _ in range(6):
            model(token, past_key_values=cache)
        model.set_sparsity(mode="image")
        for _ in range(6):
            model(token, past_key_values=cache)
    keep = cache.output_keep()[0]
    assert keep[6:].all()


def test_a_static_cache_keeps_its_tensors_between_growths():
    model, batch = MODELS["image_text"], mixed_batch(7, [(1, 4), (0, 9)])
    cache = StaticCache(5, (2,), growth_step=30)
    answers = torch.randint(3, 80, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
        before = cache.addresses()
        for column in range(20):
            model(answers[:, column : column + 1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.addresses() == before and len(before) == 3 + 2 * 5


def test_a_copied_cache_goes_its_own_way():
    """A step made over one cache's buffers is none of its copy's."""
    model, batch = MODELS["image_text"], mixed_batch(2, [(1, 4), (1, 7)])
    answers = torch.randint(3, 80, (2, 6), generator=torch.Generator().manual_seed(2))
    cache = model.new_cache("static")
    decode(model, batch, answers[:, :3], cache)
    lengths, twin = cache.kept_lengths(), copy.deepcopy(cache)
    with torch.no_grad():
        model(answers[:, 3:4], past_key_values=twin)
    assert torch.equal(cache.kept_lengths(), lengths) and twin.get_seq_length() == cache.get_seq_length() + 1
    expected = decode(model, batch, answers, model.new_cache())[:, -1]
    with torch.no_grad():
        for column in (4, 5):
            out = model(answers[:, column : column + 1], past_key_values=twin)
    torch.testing.assert_close(out.logits[:, -1], expected, **CLOSE)


def test_a_static_cache_made_under_another_policy_is_refused():
    model, batch = random_model(mode="image"), mixed_batch(2, [(1, 4)])
    cache = model.new_cache("static")
    decode(model, batch, torch.tensor([[5, 6]]), cache)
    model.set_sparsity(sparse_layer=3)
    with pytest.raises(
        UserError, match=r"made for another policy than image \(its context changes at 2, image's at 3\)"
    ):
        model(torch.tensor([[7]]), past_key_values=cache)
