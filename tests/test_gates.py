"""Several gates of the image tokens, and predictors that are told their budget: rules by hand, training, checkpoints."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given

from dynllava_plugin.errors import UserError
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.selection import ImagePredictor
from tests.property_tests import examples
from tests.test_equivalence import CLOSE, check_every_mode, samples_strategy
from tests.tiny_random import IMAGE_TOKEN, batch_of, random_model, random_sample

GATES = ((3, 0.8), (4, 0.5))
KEPT = (12, 9, 4)  # of 16 tokens: 0.75, then 0.8 and 0.5 of what is left, rounded down


def by_hand(model, sample, kept=KEPT):
    """The last token's logits and what stays behind each gate: every layer over all tokens, dropped ones masked."""
    llm, ids = model._llm, torch.tensor([sample.ids])
    embeds = model._embed(llm.policy, {"pixel_values": sample.images}, ids, output=(None, 0))[0].hidden
    length = ids.shape[1]
    rotary = llm.rotary_emb(embeds, position_ids=torch.arange(length)[None])
    starts = [i for i in range(length) if sample.ids[i] == IMAGE_TOKEN and sample.ids[i - 1] != IMAGE_TOKEN]
    images = [list(range(start, start + 16)) for start in starts]
    left, stages = [list(image) for image in images], []
    predictors = {2: llm.image_predictor, 3: llm.image_predictor_3, 4: llm.image_predictor_4}
    for number, layer in enumerate(llm.layers):
        if number in predictors:
            for index, places in enumerate(left):
                logits = predictors[number](embeds[:, places])[0]
                ranked = sorted(range(len(places)), key=lambda i: float(logits[i, 1] - logits[i, 0]))
                left[index] = sorted(places[i] for i in ranked[: kept[len(stages)]])
            stages.append([list(places) for places in left])
        dropped = {
            place
            for image, places in zip(images, left, strict=True)
            for place in image
            if place not in places
        }
        seen = [[k <= q and (k == q or k not in dropped) for k in range(length)] for q in range(length)]
        embeds = layer(embeds, attention_mask=torch.tensor(seen)[None, None], position_embeddings=rotary)
    return model._logits(llm.norm(embeds))[0, -1], stages


@torch.no_grad()
def test_each_gate_keeps_its_share_of_what_reaches_it():
    model = random_model(later_gates=GATES)
    model.set_sparsity(vision_keep_rate=0.75)
    assert model._llm.policy.layers == (2, 3, 4) and model._llm.policy.kept_tokens(16) == 4
    rng = random.Random(0)
    for images in (1, 2):
        sample = random_sample(rng, images, 5)
        expected, stages = by_hand(model, sample)
        out = model(**batch_of([sample]))
        torch.testing.assert_close(out.logits[0, -1], expected, **CLOSE)
        lengths = out.past_key_values.kept_lengths()[:, 0] - (len(sample.ids) - 16 * images)
        assert lengths.tolist() == [images * n for n in (16, 16, *KEPT)]
        places = [place for image in stages[-1] for place in image]
        assert [c for c in out.token_index[0].tolist() if sample.ids[c] == IMAGE_TOKEN] == places
    assert model._llm.policy.image_tokens(16, 4, 5) == (2 * 16 + 12 + 9 + 4) / 5


OTHERS = {"gates": random_model(later_gates=GATES), "told": random_model(vision_keep_range=(0.1, 0.6))}


@pytest.mark.parametrize("kind", OTHERS)
@examples(4)
@given(drawn=samples_strategy)
def test_batch_single_cached_uncached_and_scored_agree(kind, drawn):
    check_every_mode(OTHERS[kind], drawn)


@pytest.mark.parametrize("kind", OTHERS)
def test_generate(kind):
    rng = random.Random(5)
    batch = batch_of([random_sample(rng, images, text) for images, text in ((1, 3), (2, 7), (0, 4))])
    arguments = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5)
    cached = OTHERS[kind].generate(**batch, **arguments)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(cached, OTHERS[kind].generate(**batch, **arguments, **other)), other


def test_a_predictor_of_a_later_gate_sees_what_is_left():
    torch.manual_seed(0)
    settings = SparsityConfig(predictor_dim=32, predictor_heads=4, predictor_ffn_dim=64)
    predictor = ImagePredictor(24, settings).double()
    states, present = torch.randn(3, 10, 24).double(), torch.rand(3, 10) > 0.4
    present[2] = False  # none is left: nothing that is NaN
    found = predictor(states, present=present)
    for row in range(2):
        alone = predictor(states[row : row + 1, present[row]])
        torch.testing.assert_close(found[row : row + 1, present[row]], alone)
    assert found.isfinite().all()
    torch.testing.assert_close(predictor(states, present=torch.ones_like(present)), predictor(states))


def training_batch():
    rng = random.Random(1)
    samples = [random_sample(rng, images, text) for images, text in ((1, 3), (2, 5))]
    return batch_of(samples, left=False, labels=[[5, 6, 7, 8, 9], [11, 12, 13, 14]])


def test_in_training_masks_and_losses_multiply_gate_by_gate():
    model = random_model(later_gates=GATES).train()
    batch = training_batch()
    torch.manual_seed(0)
    noise = (torch.randn(2, 32, 6), torch.randn(2, 5, 2))
    seen = {}
    for name in ("image_predictor", "image_predictor_3", "image_predictor_4"):
        getattr(model._llm, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs, output)})
        )
    out = model(**batch, gumbel_noise=noise)
    left = torch.ones(3, 16)
    shares, loss = (0.3, 0.3 * 0.8, 0.3 * 0.8 * 0.5), 0.0
    for index, name in enumerate(seen):
        (_, _, present), logits = seen[name]
        assert (present is None) if not index else torch.equal(present, left > 0)
        drawn = torch.stack([noise[0][0, :16], noise[0][1, :16], noise[0][1, 16:]])[
            ..., 2 * index : 2 * index + 2
        ]
        left = left * ((logits + drawn)[..., 0] > (logits + drawn)[..., 1])
        rates = [left[0].mean(), (left[1].sum() + left[2].sum()) / 32]
        loss += sum((shares[index] - rate) ** 2 for rate in rates) / 2
    assert torch.equal(out.image_keep[0, :16], left[0] > 0) and torch.equal(
        out.image_keep[1], left[1:].flatten() > 0
    )
    assert 0 < left.mean() < 0.5
    torch.testing.assert_close(out.image_keep_loss, loss.double().float())
    out.loss.backward()
    for name in seen:
        assert getattr(model._llm, name).in_proj.weight.grad.abs().sum() > 0, name


def test_a_predictor_that_is_told_its_budget_ranks_by_it():
    model = random_model(vision_keep_range=(0.1, 0.6))
    batch = batch_of([random_sample(random.Random(3), 1, 5)])
    orders = []
    for rate in (0.125, 0.25, 0.5):
        model.set_sparsity(vision_keep_rate=rate)
        with torch.no_grad():
            out = model(**batch)
        assert int(out.image_keep.sum()) == 16 * rate
        orders.append(out.image_score[0].argsort().tolist())
    assert len(set(map(tuple, orders))) > 1
    model.train()
    batch, rates = training_batch(), torch.tensor([0.1, 0.5])
    out = model(**batch, keep_rates=rates)
    kept = [out.image_keep[0, :16].float().mean(), out.image_keep[1].float().mean()]
    expected = sum((rate - share) ** 2 for rate, share in zip(rates, kept, strict=True)) / 2
    torch.testing.assert_close(out.image_keep_loss, expected)
    zero = (torch.zeros(2, 32, 2), None)
    with torch.no_grad():
        drawn = {float(model(**batch, gumbel_noise=zero).image_keep_loss) for _ in range(3)}
    assert len(drawn) == 3  # where none are given


def test_settings_that_no_model_has():
    for values, named in (
        ({"later_gates": [[2, 0.5]]}, "layers must rise"),
        ({"later_gates": [[4, 0.5], [3, 0.5]]}, "layers must rise"),
        ({"later_gates": [[3, 0.0]]}, "rates be in"),
        ({"later_gates": [[3]]}, "must be pairs"),
        ({"later_gates": 3}, "must be pairs"),
        ({"vision_keep_range": [0.5, 0.1]}, "does not rise"),
        ({"vision_keep_range": [0.5]}, "must be pairs"),
    ):
        with pytest.raises(UserError, match=named):
            SparsityConfig(**values)
    model = random_model(later_gates=GATES)
    for changes, named in (
        ({"policy": "image,tokens=6"}, "no setting of it leaves tokens=6 of an image's 16; the nearest is 7"),
        ({"policy": "image+h2o"}, "has gates at several layers"),
        ({"later_gates": ((3, 0.1),)}, "can't be changed"),
        ({"sparse_layer": 3}, "layers must rise"),
    ):
        with pytest.raises(UserError, match=named):
            model.set_sparsity(**changes)
    model.set_sparsity(policy="image,tokens=8")  # (2 * 16 + 4 + 3 + 1) / 5
    assert model._llm.policy.image.left(16) == (4, 3, 1)
    model.set_sparsity(policy="image,layer=3")  # by argument, one gate
    assert model._llm.policy.layers == (3,)
    with pytest.raises(UserError, match="outside the model"):
        random_model(later_gates=((5, 0.5),))


def test_a_static_cache_is_filled_gate_by_gate():
    """A bucket's prefill has one gate's shapes, so that these prompts go the plain way."""
    batch = batch_of([random_sample(random.Random(seed), 1, 5) for seed in (1, 2)])
    held = []
    for kind in (None, "static"):
        cache = OTHERS["gates"].new_cache(*filter(None, [kind]))
        with torch.no_grad():
            OTHERS["gates"](**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        held.append(cache.kept_lengths())
    assert torch.equal(*held)


def test_the_shortest_text_that_trains_the_text_predictor_is_as_long_as_the_setting_says():
    """ "Of at least `min_text_length` tokens", as in the published code; a shorter one is kept whole and adds no loss."""
    model = random_model(mode="image_text").train()
    sample = random_sample(random.Random(0), 1, 6)
    losses = [
        model(**batch_of([sample], left=False, labels=[[5] * count])).text_keep_loss for count in (3, 4)
    ]
    assert losses[0] == 0 < losses[1]
