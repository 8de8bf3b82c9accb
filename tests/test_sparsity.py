"""The method's equations on plain tensors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.errors import UserError
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.masked_softmax import (
    context_matrix,
    masked_softmax_attention,
    plain_masked_softmax,
    training_context,
    visible_matrix,
)
from dynllava_plugin.sparsity.objective import keep_loss, lm_loss
from dynllava_plugin.sparsity.selection import (
    gumbel_keep_mask,
    keep_score,
    last_answer,
    num_kept_image_tokens,
    random_image_scores,
    select_image_tokens,
    select_text_tokens,
    tau_at,
)
from tests.property_tests import examples


@pytest.mark.parametrize(
    ("tokens", "rate", "kept"),
    [(576, 0.2, 115), (64, 0.2, 12), (64, 0.1, 6), (100, 0.29, 29), (4, 0.1, 1), (7, 1.0, 7)],
)
def test_number_of_kept_image_tokens(tokens, rate, kept):
    assert num_kept_image_tokens(tokens, rate) == kept


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_kept_image_tokens_have_the_highest_scores(images, tokens, rate, seed):
    scores = torch.randn(images, tokens, generator=torch.Generator().manual_seed(seed))
    keep = select_image_tokens(scores, num_kept_image_tokens(tokens, rate))
    assert (keep.sum(1) == num_kept_image_tokens(tokens, rate)).all()
    for row, kept in zip(scores, keep, strict=True):
        if not kept.all():
            assert row[kept].min() >= row[~kept].max()


def test_text_decision_is_the_argmax_and_index_0_keeps():
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [-3.0, -2.0]])
    assert select_text_tokens(keep_score(logits)).tolist() == [True, False, False]


def test_random_scores_depend_on_the_image_seed_only():
    device = torch.device("cpu")
    both = random_image_scores([3, 4], 20, device)
    assert torch.equal(both[1], random_image_scores([4], 20, device)[0])
    assert not torch.equal(both[0], both[1])


@given(st.integers(0, 1000), st.floats(0.1, 1.0))
def test_gumbel_mask_is_hard_forward_and_soft_backward(seed, tau):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 2, generator=generator, dtype=torch.float32, requires_grad=True)
    noise = torch.randn(6, 2, generator=generator)
    mask = gumbel_keep_mask(logits, noise, tau)
    expected = ((logits + noise).argmax(-1) == 0).float()
    torch.testing.assert_close(mask, expected)
    (gradient,) = torch.autograd.grad(mask.sum(), logits)
    (soft,) = torch.autograd.grad(torch.softmax((logits + noise) / tau, -1)[:, 0].sum(), logits)
    torch.testing.assert_close(gradient, soft)


def test_tau_decays_exponentially():
    assert tau_at(0, 100) == 1.0
    assert tau_at(50, 100) == pytest.approx(0.1**0.5)
    assert tau_at(100, 100) == pytest.approx(0.1) == tau_at(500, 100)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_last_answer_is_the_last_run_of_labels(labelled):
    labels = torch.tensor([[7 if x else -100 for x in labelled]])
    expected, column = [False] * len(labelled), len(labelled) - 1
    while column >= 0 and not labelled[column]:
        column -= 1
    while column >= 0 and labelled[column]:
        expected[column] = True
        column -= 1
    assert last_answer(labels)[0].tolist() == expected


def test_keep_loss_counts_exempt_samples_in_the_mean():
    masks = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    valid = torch.tensor([[True] * 4, [True, True, True, False]])
    loss = keep_loss(masks, valid, torch.tensor([True, False]), 0.2)
    assert float(loss) == pytest.approx(0.5 * (0.2 - 0.5) ** 2)
    assert float(keep_loss(masks, valid, torch.tensor([True, True]), 0.2)) == pytest.approx((0.09 + 0.64) / 2)


def test_lm_loss_ignores_padding_and_takes_a_global_divisor():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, 1, 2, -100, -100], [-100, -100, 3, 4, 5]])
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(lm_loss(logits, labels), expected)
    torch.testing.assert_close(lm_loss(logits, labels, 20), expected * 5 / 20)


def eq_7(query, key, value, keep, valid, scaling):
    """Eq. 7 as a sum over kept tokens, one query at a time."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = [j for j in range(i + 1) if valid[b, j] and (keep[b, j] or j == i)]
                if seen:
                    weights = torch.softmax(query[b, h, i] @ key[b, h // groups, seen].T * scaling, -1)
                    out[b, h, i] = weights @ value[b, h // groups, seen]
    return out


@examples(30)
@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.floats(0, 1),
)
def test_masked_softmax_is_softmax_over_what_is_kept(seed, batch, length, heads, rate):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], length, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, heads[1], length, 5, generator=generator, dtype=torch.float64)
    value = torch.randn(batch, heads[1], length, 5, generator=generator, dtype=torch.float64)
    keep = torch.rand(batch, length, generator=generator) < rate
    valid = torch.rand(batch, length, generator=generator) < 0.8
    expected = eq_7(query, key, value, keep, valid, 0.7)
    context = training_context(keep.double(), valid)
    torch.testing.assert_close(masked_softmax_attention(query, key, value, context, 0.7), expected)
    torch.testing.assert_close(
        plain_masked_softmax(query, key, value, context_matrix(keep.double()), visible_matrix(valid), 0.7),
        expected,
    )


def test_masked_softmax_survives_extreme_scores():
    query = torch.full((1, 1, 2, 4), 40.0, requires_grad=True)
    key = torch.tensor([[[[40.0] * 4, [-40.0] * 4]]], requires_grad=True)
    value = torch.randn(1, 1, 2, 4, requires_grad=True)
    keep = torch.tensor([[0.0, 1.0]], requires_grad=True)
    context = training_context(keep, torch.ones(1, 2, dtype=torch.bool))
    out = masked_softmax_attention(query, key, value, context, 1.0)
    out.sum().backward()
    torch.testing.assert_close(out, value)  # both see only themselves
    assert all(t.grad.isfinite().all() for t in (query, key, value, keep))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_keep_rate": 0}, "vision_keep_rate: 0 is outside"),
        ({"text_keep_rate": 1.5}, "text_keep_rate: 1.5 is outside"),
        ({"vision_keep_rate": float("nan")}, "vision_keep_rate: nan is outside"),
        ({"sparse_layer": 0}, "sparse_layer: 0 is not a positive integer"),
        ({"mode": "fast"}, "mode: unknown value 'fast'; choose one of full, image, image_text"),
        ({"image_policy": "best"}, "image_policy: unknown value 'best'"),
        ({"mode": "image_text", "text_predictor": False}, "needs an output-text predictor"),
        ({"predictor_dim": 30}, "predictor_dim: 30 must be divisible"),
        ({"maskclip": 1}, "maskclip: no such sparsity setting"),
        ({"policy_args": 0.5}, "policy_args: 0.5 is not a dict"),
        ({"policy": "fastv", "policy_args": None}, "policy_args: None is not a dict"),
        ({"text_predictor": [1]}, "text_predictor: [1] is not a bool"),
    ],
)
def test_settings_out_of_range_are_one_line_errors(values, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        SparsityConfig.from_dict(values)
    assert "\n" not in str(error.value)


def test_gradient_of_a_dropped_token_is_bounded():
    """A dropped token that outweighs all kept ones must not drown every other gradient, and must still pull."""
    query = torch.tensor([[[[30.0, 0.0], [30.0, 0.0]]]])
    key = torch.tensor([[[[3.0, 0.0], [0.0, 0.0]]]])
    value = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    keep = torch.tensor([[0.0, 1.0]], requires_grad=True)
    context = training_context(keep, torch.ones(1, 2, dtype=torch.bool))
    masked_softmax_attention(query, key, value, context, 1.0).sum().backward()
    assert 1.0 < float(keep.grad[0, 0]) < 4000.0
