"""`generate()`: greedy, sampling, beams, streaming, several return sequences, with and without a cache."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import pytest
import torch
from transformers import DynamicCache

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.generation import default_cache
from dynllava_plugin.model.static_decoding import StaticCache
from dynllava_plugin.policies import policy_of
from dynllava_plugin.sparsity.config import SparsityConfig
from tests.tiny_random import EOS, batch_of, random_model, random_sample

MODEL = random_model()


@pytest.fixture
def batch():
    rng = random.Random(5)
    return batch_of([random_sample(rng, images, text) for images, text in ((1, 3), (2, 8), (0, 5), (1, 1))])


def continuation(batch, output):
    return output[:, batch["input_ids"].shape[1] :]


def greedy_by_hand(sample, steps):
    batch = batch_of([sample])
    mask, tokens = batch["attention_mask"], []
    with torch.no_grad():
        out = MODEL(**batch, use_cache=True)
        for _ in range(steps):
            tokens.append(int(out.logits[0, -1].argmax()))
            if tokens[-1] == EOS:
                break
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            out = MODEL(
                torch.tensor([[tokens[-1]]]), attention_mask=mask, past_key_values=out.past_key_values
            )
    return tokens


def test_greedy_batch_equals_single_by_hand(batch):
    rng = random.Random(5)
    samples = [random_sample(rng, images, text) for images, text in ((1, 3), (2, 8), (0, 5), (1, 1))]
    output = continuation(batch, MODEL.generate(**batch, do_sample=False, max_new_tokens=20))
    for row, sample in zip(output, samples, strict=True):
        expected = greedy_by_hand(sample, 20)
        assert row[: len(expected)].tolist() == expected


def test_without_cache_equals_with_cache(batch):
    cached = MODEL.generate(**batch, do_sample=False, max_new_tokens=16, min_new_tokens=16)
    uncached = MODEL.generate(**batch, do_sample=False, max_new_tokens=16, min_new_tokens=16, use_cache=False)
    assert cached.shape[1] == batch["input_ids"].shape[1] + 16
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_scores_are_the_models_own(batch, use_cache):
    """The best beam's score is the sum of its tokens' log-probabilities under `score`: no beam saw another's context."""
    steps = 7
    out = MODEL.generate(
        **batch, num_beams=3, num_return_sequences=2, do_sample=False, length_penalty=0.0, min_new_tokens=steps,
        max_new_tokens=steps, suppress_tokens=[EOS], use_cache=use_cache, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    prompt = batch["input_ids"].shape[1]
    for row, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        sample = row // 2
        mask = torch.cat([batch["attention_mask"][sample], torch.ones(steps, dtype=torch.int64)])[None]
        per_image = 16
        counts = (batch["input_ids"] == MODEL.config.image_token_id).sum(1) // per_image
        start = int(counts[:sample].sum())
        pixels = batch["pixel_values"][start : start + int(counts[sample])]
        labels = sequence[None].clone()
        labels[:, :prompt] = -100
        logits = _logits_by_score(sequence[None], mask, pixels, labels, prompt)
        assert float(score) == pytest.approx(logits, abs=2e-3)


def _logits_by_score(ids, mask, pixels, labels, prompt):
    # Suppressing EOS doesn't renormalise: the beams' scores are plain log-probabilities.
    scores = MODEL.score(ids, mask, pixels if len(pixels) else None, labels)
    return float(scores[:, prompt:].sum())


def test_sampling_several_sequences_and_seeds(batch):
    def sample(seed):
        torch.manual_seed(seed)
        return MODEL.generate(
            **batch, do_sample=True, num_return_sequences=3, max_new_tokens=8, min_new_tokens=8
        )

    assert sample(0).shape == (12, batch["input_ids"].shape[1] + 8)
    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_streamer_sees_every_token():
    class Collector:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    single = batch_of([random_sample(random.Random(8), 1, 4)])
    collector = Collector()
    output = MODEL.generate(**single, do_sample=False, max_new_tokens=9, streamer=collector)
    assert collector.tokens == output[0].tolist() and collector.ended


def test_token_limits(batch):
    output = MODEL.generate(**batch, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    new = continuation(batch, output)
    assert new.shape[1] == 5
    assert not (new[:, :4] == EOS).any()


def test_cache_of_generate_reports_lengths(batch):
    out = MODEL.generate(
        **batch, do_sample=False, max_new_tokens=10, min_new_tokens=10, return_dict_in_generate=True
    )
    lengths = out.past_key_values.kept_lengths()
    real = batch["attention_mask"].sum(1)
    assert torch.equal(lengths[0], real + 9)  # the last token is never fed
    assert (lengths[2:] <= lengths[0]).all()
    assert out.past_key_values.output_keep().shape == (4, 9)


def test_several_images_of_one_sample_differ():
    """Each image of a sample goes to its own place: swapping two changes the answer's distribution."""
    sample = random_sample(random.Random(9), 2, 4)
    swapped = random_sample(random.Random(9), 2, 4)
    swapped.images = swapped.images.flip(0)
    with torch.no_grad():
        logits = [MODEL(**batch_of([s])).logits[0, -1] for s in (sample, swapped)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_wrong_uses_say_what_to_do(batch):
    with pytest.raises(UserError, match="past_key_values: DynamicCache"):
        MODEL(**batch, past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(UserError, match="image tokens for 1 images"):
        MODEL(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][:1])
    with pytest.raises(UserError, match="attention_mask: shape"):
        MODEL(batch["input_ids"], batch["attention_mask"][:, 1:], batch["pixel_values"])
    with pytest.raises(UserError, match=r"vision_keep_rate: 0\.0 is outside"):
        MODEL.set_sparsity(vision_keep_rate=0.0)
    with pytest.raises(UserError, match="sparse_layer: 5 is outside the model"):
        MODEL.set_sparsity(sparse_layer=5)
    with pytest.raises(UserError, match="mode: unknown value 'images'"):
        MODEL.set_sparsity(mode="images")
    with pytest.raises(UserError, match="predictor_dim: the loaded predictors have 32"):
        MODEL.set_sparsity(predictor_dim=64)
    with pytest.raises(UserError, match="keep_rate: no such sparsity setting"):
        MODEL.set_sparsity(keep_rate=0.5)
    with pytest.raises(NotImplementedError, match="can't be cropped"):
        MODEL.new_cache().crop(-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("prefill_chunk_size", 8), ("assistant_model", MODEL), ("prompt_lookup_num_tokens", 3), ("assistant_early_exit", 2)],
)  # fmt: skip
def test_what_would_drop_other_tokens_is_refused(batch, name, value):
    with pytest.raises(UserError, match=f"{name}: .*leave it out"):
        MODEL.generate(**batch, max_new_tokens=2, **{name: value})
    if name != "assistant_model":
        settings = copy.deepcopy(MODEL.generation_config)
        setattr(settings, name, value)
        with pytest.raises(UserError, match=name):
            MODEL.generate(**batch, max_new_tokens=2, generation_config=settings)


def test_guidance_without_a_cache_is_refused_where_output_text_may_go(batch):
    """Its second pass would keep what the first one drops."""
    options = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6, guidance_scale=1.5)
    MODEL.set_sparsity(mode="image")
    answer = MODEL.generate(**batch, **options)
    assert torch.equal(MODEL.generate(**batch, **options, use_cache=False), answer)
    MODEL.set_sparsity(mode="image_text")
    answer = MODEL.generate(**batch, **options)
    assert torch.equal(MODEL.generate(**batch, **options, cache_implementation="static"), answer)
    with pytest.raises(UserError, match=r"guidance_scale: .*leave use_cache out"):
        MODEL.generate(**batch, **options, use_cache=False)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"policy": "h2o,r=0.5"}])
def test_a_cache_is_freed_when_generate_returns(batch, options, monkeypatch):
    """By reference counts alone: on a GPU its memory would wait for Python's cyclic collector otherwise."""
    made, new_cache = [], MODEL.new_cache

    def watched(*args, **kwargs):
        cache = new_cache(*args, **kwargs)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(MODEL, "new_cache", watched)
    gc.collect()
    gc.disable()
    try:
        MODEL.generate(**batch, max_new_tokens=4, **options)
        assert made and all(reference() is None for reference in made)
    finally:
        gc.enable()


def test_as_the_stock_class_in_small_things(batch):
    """A configuration by position; a model that is being trained; padding on the right."""
    settings = copy.deepcopy(MODEL.generation_config)
    settings.max_new_tokens, settings.do_sample = 5, False
    ids, rest = batch["input_ids"], {key: value for key, value in batch.items() if key != "input_ids"}
    expected = MODEL.generate(ids, **rest, max_new_tokens=5, do_sample=False)
    assert torch.equal(MODEL.generate(ids, settings, **rest), expected)
    MODEL.train()
    try:
        assert torch.equal(MODEL.generate(ids, settings, **rest), expected) and MODEL.training
    finally:
        MODEL.eval()
    rng = random.Random(2)
    samples = [random_sample(rng, 1, 3), random_sample(rng, 2, 9)]
    left, right = (
        MODEL.generate(**batch_of(samples, left=side), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        for side in (True, False)
    )
    assert torch.equal(left[:, -6:], right[:, -6:])


def test_captured_steps_are_the_default_where_there_is_cuda():
    cuda, policies = (
        torch.device("cuda"),
        {name: policy_of(SparsityConfig(policy=name)) for name in ("image", "h2o")},
    )
    assert (
        default_cache(cuda, policies["image"]) == "static"
        and default_cache(cuda, policies["h2o"]) == "dynamic"
    )
    assert default_cache(torch.device("cpu"), policies["image"]) == "dynamic"


@pytest.mark.parametrize("tokens", [(1, 1), (2, 1), (3, 1), (8, 1), (4, 16), (5, 16)])
def test_logits_of_few_tokens_are_those_of_the_output_matrix(tokens):
    hidden = torch.randn(*tokens, 32)
    with torch.no_grad():
        torch.testing.assert_close(MODEL._logits(hidden), MODEL.lm_head(hidden), rtol=1e-5, atol=1e-5)
        assert MODEL._logits(hidden).is_contiguous()


def test_images_of_a_later_turn_count_encoded_or_as_pixels(batch):
    """Features that `generate` has encoded already are images as much as pixels are, behind a cache, too."""
    rng = random.Random(3)
    first, second = random_sample(rng, 1, 4), random_sample(rng, 1, 4)
    chunk, logits = torch.tensor([second.ids]), []
    encoded = MODEL.get_image_features(pixel_values=second.images, return_dict=True)
    for images in ({"pixel_values": second.images}, {"mm_encoder_outputs": {"image": encoded}}):
        with torch.no_grad():
            cache = MODEL(**batch_of([first]), use_cache=True).past_key_values
            mask = torch.ones(1, cache.get_seq_length() + chunk.shape[1], dtype=torch.int64)
            length = mask.shape[1]
            out = MODEL(chunk, attention_mask=mask, past_key_values=cache, prompt_length=length, **images)
            logits.append(out.logits[0, -1])
    torch.testing.assert_close(logits[0], logits[1])
    with torch.no_grad(), pytest.raises(UserError, match="16 image tokens for no image"):
        MODEL(chunk, attention_mask=mask, past_key_values=MODEL(**batch_of([first])).past_key_values)


@pytest.mark.parametrize("mode", ["full", "image", "image_text"])
def test_the_last_token_of_a_right_padded_batch(mode):
    """`logits_to_keep=1` is the last real token's, on whichever side the padding is."""
    model = random_model(mode=mode)
    rng = random.Random(8)
    samples = [random_sample(rng, images, text) for images, text in ((0, 3), (0, 9), (0, 5))]
    if mode != "full":
        samples = [random_sample(rng, images, text) for images, text in ((1, 3), (2, 8), (0, 5))]
    with torch.no_grad():
        left, right = (
            model(**batch_of(samples, left=side), logits_to_keep=1).logits[:, -1] for side in (True, False)
        )
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_chance_is_not_trained():
    model = random_model(mode="image", image_policy="random").train()
    batch = batch_of([random_sample(random.Random(0), 1, 3)], labels=[[5, 6]])
    with pytest.raises(UserError, match="image_policy: chance can't be trained"):
        model(**batch)


def test_a_first_token_has_no_score_in_a_batch_either():
    rng = random.Random(4)
    samples = [random_sample(rng, 0, text) for text in (3, 8)]
    batch = batch_of(samples)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    together = MODEL.score(**batch, labels=labels)
    alone = batch_of(samples[:1])
    single = MODEL.score(**alone, labels=alone["input_ids"])
    torch.testing.assert_close(together[:1, -single.shape[1] :], single, rtol=1e-4, atol=1e-4)
    assert float(single[0, 0]) == 0 and float(single[0, 1]) != 0


def test_a_generation_config_may_ask_for_the_static_cache(batch):
    config = copy.deepcopy(MODEL.generation_config)
    config.cache_implementation = "static"
    config.max_new_tokens, config.do_sample = 5, False
    out = MODEL.generate(**batch, generation_config=config, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, StaticCache) and config.cache_implementation == "static"
    assert torch.equal(out.sequences, MODEL.generate(**batch, do_sample=False, max_new_tokens=5))
    with pytest.raises(UserError, match="cache_implementation: past_key_values is given"):
        MODEL.generate(**batch, cache_implementation="static", past_key_values=MODEL.new_cache())
