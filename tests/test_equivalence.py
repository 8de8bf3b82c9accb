"""The same thing computed in two ways: batch = single, cached = uncached = scored in parallel, chunked = whole."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.property_tests import examples
from tests.tiny_random import TOKENS_PER_IMAGE, VOCAB, batch_of, random_model, random_sample

CLOSE = dict(rtol=1e-4, atol=1e-4)
MODES = ("full", "image", "image_text")
MODELS = {mode: random_model(mode=mode) for mode in MODES}
RANDOM_POLICY = random_model(image_policy="random")

samples_strategy = st.tuples(
    st.integers(0, 2**20),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=4),
)


def make_samples(drawn):
    seed, shapes = drawn
    rng = random.Random(seed)
    return rng, [random_sample(rng, images, text) for images, text in shapes]


def step_by_step(model, batch, answers):
    """[B, T, V] logits before each answer token, fed one by one behind the cache; and the cache."""
    mask = batch["attention_mask"]
    with torch.no_grad():
        out = model(**batch, use_cache=True, logits_to_keep=1)
        logits = [out.logits[:, -1]]
        for column in range(answers.shape[1] - 1):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(
                answers[:, column : column + 1],
                attention_mask=mask,
                past_key_values=out.past_key_values,
                logits_to_keep=1,
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), out.past_key_values


@pytest.mark.parametrize("mode", [*MODES, "random"])
@examples(25)
@given(drawn=samples_strategy)
def test_batch_equals_single_in_every_inference_mode(mode, drawn):
    check_every_mode(RANDOM_POLICY if mode == "random" else MODELS[mode], drawn)


def check_every_mode(model, drawn):
    rng, samples = make_samples(drawn)
    steps = 6
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(steps)] for _ in samples])
    together, cache = step_by_step(model, batch_of(samples), answers)
    lengths = cache.kept_lengths()
    keep = cache.output_keep()
    scored = model.score(**batch_of(samples, left=rng.random() < 0.5, labels=answers.tolist()))
    for row, sample in enumerate(samples):
        alone, own = step_by_step(model, batch_of([sample]), answers[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], **CLOSE)
        assert torch.equal(lengths[:, row], own.kept_lengths()[:, 0])
        assert torch.equal(keep[row], own.output_keep()[0])
        # one parallel pass
        expected = alone[0].log_softmax(-1).gather(-1, answers[row][:, None])[:, 0]
        torch.testing.assert_close(scored[row][scored[row] != 0], expected, **CLOSE)
        # without a cache, from scratch at every step
        for step in (0, steps // 2, steps - 1):
            ids = torch.tensor([sample.ids + answers[row, :step].tolist()])
            pixels = sample.images if len(sample.images) else None
            with torch.no_grad():
                out = model(
                    ids, pixel_values=pixels, use_cache=False, prompt_length=len(sample.ids), logits_to_keep=1
                )
            torch.testing.assert_close(out.logits[0, -1], alone[0, step], **CLOSE)


@examples(20)
@given(drawn=samples_strategy)
def test_cache_holds_only_what_is_kept(drawn):
    rng, samples = make_samples(drawn)
    model = MODELS["image_text"]
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(5)] for _ in samples])
    _, cache = step_by_step(model, batch_of(samples), answers)
    lengths = cache.kept_lengths()
    kept_per_image = int(0.3 * TOKENS_PER_IMAGE)
    for row, sample in enumerate(samples):
        images = len(sample.images)
        text = len(sample.ids) - images * TOKENS_PER_IMAGE
        assert lengths[0, row] == lengths[1, row] == len(sample.ids) + 4
        expected = text + images * kept_per_image + int(cache.output_keep()[row].sum())
        assert (lengths[2:, row] == expected).all()


@examples(20)
@given(drawn=samples_strategy, pieces=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_answer_fed_in_chunks_equals_token_by_token(drawn, pieces):
    """Several output tokens behind a cache in one call (forced continuation) decide and attend as one by one."""
    rng, samples = make_samples(drawn)
    model = MODELS["image_text"]
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(sum(pieces) + 1)] for _ in samples])
    expected, stepwise = step_by_step(model, batch_of(samples), answers)
    batch = batch_of(samples)
    prompt_length = batch["input_ids"].shape[1]
    mask, at, logits = batch["attention_mask"], 0, []
    with torch.no_grad():
        out = model(**batch, use_cache=True, prompt_length=prompt_length)
        for piece in pieces:
            mask = torch.cat([mask, mask.new_ones(len(mask), piece)], 1)
            out = model(
                answers[:, at : at + piece],
                attention_mask=mask,
                past_key_values=out.past_key_values,
                prompt_length=prompt_length,
            )
            logits.append(out.logits)
            at += piece
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, 1:], **CLOSE)
    assert torch.equal(out.past_key_values.kept_lengths(), stepwise.kept_lengths())
    assert torch.equal(out.past_key_values.output_keep(), stepwise.output_keep())


@examples(15)
@given(drawn=samples_strategy)
def test_prompt_continued_behind_a_cache(drawn):
    """A second prompt part behind the cache of the first (prompt text: nothing of it is dropped) = the whole prompt at once."""
    rng, samples = make_samples(drawn)
    model = MODELS["image_text"]
    more = torch.tensor([[rng.randrange(3, 80) for _ in range(3)] for _ in samples])
    batch = batch_of(samples)
    whole_mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
    whole = {**batch, "input_ids": torch.cat([batch["input_ids"], more], 1), "attention_mask": whole_mask}
    with torch.no_grad():
        expected = model(**whole, use_cache=True, logits_to_keep=1)
        first = model(**batch, use_cache=True)
        out = model(more, attention_mask=whole_mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(out.logits[:, -1], expected.logits[:, -1], **CLOSE)
    assert torch.equal(out.past_key_values.kept_lengths(), expected.past_key_values.kept_lengths())


def test_eager_attention_equals_sdpa():
    rng = random.Random(1)
    samples = [random_sample(rng, n, t) for n, t in ((1, 3), (2, 7), (0, 4))]
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(8)] for _ in samples])
    results = [
        step_by_step(random_model(attention=a), batch_of(samples), answers)[0] for a in ("sdpa", "eager")
    ]
    torch.testing.assert_close(*results, **CLOSE)
    scores = [
        random_model(attention=a).score(**batch_of(samples, labels=answers.tolist()))
        for a in ("sdpa", "eager")
    ]
    torch.testing.assert_close(*scores, **CLOSE)


def test_long_decoding_crosses_growth_steps():
    rng = random.Random(2)
    samples = [random_sample(rng, 1, 3), random_sample(rng, 1, 8)]
    steps = 150  # more than two growth steps
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(steps)] for _ in samples])
    model = MODELS["image_text"]
    logits, cache = step_by_step(model, batch_of(samples), answers)
    scored = model.score(**batch_of(samples, labels=answers.tolist()))
    expected = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    torch.testing.assert_close(scored[:, -steps:], expected, **CLOSE)
    keep = cache.output_keep()
    assert 0.1 < keep.float().mean() < 0.9, "the random predictor should both keep and drop"
    needed = (
        cache.kept_lengths().amax(1).sum() * 2 * len(samples) * 2 * 8 * 4
    )  # K and V, samples, heads, width, bytes
    assert cache.num_bytes() <= needed + 5 * 2 * len(samples) * 2 * 8 * 4 * 128


def test_dropped_tokens_matter():
    """Guards the tests above against a model that ignores its context."""
    rng = random.Random(3)
    sample = random_sample(rng, 1, 4)
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(24)]])
    logits = {mode: step_by_step(MODELS[mode], batch_of([sample]), answers)[0] for mode in MODES}
    assert (logits["full"] - logits["image"]).abs().max() > 1e-2
    assert (logits["image"] - logits["image_text"]).abs().max() > 1e-2
    assert logits["full"].shape[-1] == VOCAB
