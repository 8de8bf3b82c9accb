"""`generate()`: greedy, sampling, beams, streaming, several return sequences, with and without a cache."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import DynamicCache

from dynllava_plugin.errors import UserError
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


@pytest.mark.parametrize("tokens", [(1, 1), (2, 1), (3, 1), (8, 1), (4, 16), (5, 16)])
def test_logits_of_few_tokens_are_those_of_the_output_matrix(tokens):
    hidden = torch.randn(*tokens, 32)
    with torch.no_grad():
        torch.testing.assert_close(MODEL._logits(hidden), MODEL.lm_head(hidden), rtol=1e-5, atol=1e-5)
        assert MODEL._logits(hidden).is_contiguous()
