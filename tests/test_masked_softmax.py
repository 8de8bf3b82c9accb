"""The training attention in strips of rows against the full matrix: values, gradients, memory, and inside torch's machinery."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.attention import SparseCall, use_sparse_attention
from dynllava_plugin.sparsity.kernels import blocks
from dynllava_plugin.sparsity.masked_softmax import (
    MAX_EXPONENT,
    context_matrix,
    implementation,
    masked_softmax_attention,
    plain_masked_softmax,
    training_context,
    visible_matrix,
)
from tests.property_tests import examples
from tests.tiny_random import batch_of, random_model, random_sample

SCALING = 0.7


def inputs(seed, batch, heads, length, dim, rate, padding="none", dtype=torch.float64, spread=1.0):
    """q, k, v, keep (leaves), valid and a gradient of the output; the last sample is padding only where `padding` says so."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    query, key, value, upstream = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for s in shapes
    )
    keep = (torch.rand(batch, length, generator=generator) < rate).to(
        torch.promote_types(dtype, torch.float32)
    )
    valid = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        cut = int(torch.randint(0, length, (1,), generator=generator))
        if padding == "left":
            valid[row, :cut] = False
        elif padding == "right":
            valid[row, length - cut :] = False
        elif padding == "anywhere":
            valid[row] = torch.rand(length, generator=generator) < 0.7
    if padding == "whole sample":
        valid[-1] = False
    leaves = [(query * spread).requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    return [*leaves, keep.requires_grad_()], valid, upstream


def ours(leaves, valid):
    return masked_softmax_attention(*leaves[:3], training_context(leaves[3], valid), SCALING)


def plain(leaves, valid):
    return plain_masked_softmax(*leaves[:3], context_matrix(leaves[3]), visible_matrix(valid), SCALING)


def with_gradients(attend, leaves, valid, upstream):
    out = attend(leaves, valid)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@contextmanager
def strips_of(rows, scores=2**19):
    """Short strips, few heads at a time, so that small shapes have several."""
    before = blocks._ROWS, blocks._SCORES
    blocks._ROWS, blocks._SCORES = rows, {"cpu": scores}
    yield
    blocks._ROWS, blocks._SCORES = before


@examples(60)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (6, 3)]),
    length=st.integers(1, 40),
    dim=st.sampled_from([1, 5, 8]),
    rate=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    padding=st.sampled_from(["none", "left", "right", "anywhere", "whole sample"]),
    rows=st.sampled_from([1, 4, 7, 16, 64]),
    spread=st.sampled_from([1.0, 8.0]),
    scores=st.sampled_from([1, 2**19]),
)
def test_equals_the_full_matrix(seed, batch, heads, length, dim, rate, padding, rows, spread, scores):
    leaves, valid, upstream = inputs(seed, batch, heads, length, dim, rate, padding, spread=spread)
    expected = with_gradients(plain, leaves, valid, upstream)
    with strips_of(rows, scores):
        found = with_gradients(ours, leaves, valid, upstream)
    for name, a, b in zip(("out", "query", "key", "value", "keep"), found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("rate", "padding"), [(0.5, "none"), (0.0, "left"), (1.0, "right"), (0.5, "anywhere")]
)
def test_gradients_by_finite_differences(rate, padding):
    leaves, valid, _ = inputs(3, 1, (2, 1), 7, 2, rate, padding)
    context = training_context(leaves[3].detach(), valid)
    with strips_of(3):
        assert torch.autograd.gradcheck(
            lambda *qkv: masked_softmax_attention(*qkv, context, SCALING), leaves[:3]
        )


def test_gradient_of_the_keep_mask_is_the_papers_formula():
    """Sum over rows below the diagonal of p~_ij * dO_i . (v_j - O_i), p~ over all visible tokens."""
    leaves, valid, upstream = inputs(5, 2, (2, 2), 33, 4, 0.5)
    query, key, value, keep = leaves
    with strips_of(8):
        out, *_, gradient = with_gradients(ours, leaves, valid, upstream)
    with torch.no_grad():
        exponent = (query @ key.mT * SCALING).exp().tril()
        kept = torch.where(torch.eye(33, dtype=torch.bool), 1.0, keep[:, None, None, :])
        share = exponent / (exponent * kept).sum(-1, keepdim=True)
        pairs = share * (upstream @ value.mT - (upstream * out).sum(-1, keepdim=True))
        expected = pairs.tril(-1).sum((1, 2))
    torch.testing.assert_close(gradient, expected)
    assert (gradient[keep == 0].abs() > 1e-6).any()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_lower_precisions_are_close_to_float64(dtype, tolerance):
    leaves, valid, upstream = inputs(1, 2, (4, 2), 70, 16, 0.4, "left", dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = with_gradients(plain, exact, valid, upstream.double())
    with strips_of(16):
        found = with_gradients(ours, leaves, valid, upstream)
    assert [x.dtype for x in found] == [dtype] * 4 + [torch.float32]
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_a_sample_of_padding_gives_zeros_and_no_gradient():
    leaves, valid, upstream = inputs(2, 2, (2, 1), 20, 4, 0.5, "whole sample")
    assert all((x[1] == 0).all() for x in with_gradients(ours, leaves, valid, upstream))
    assert all((x[0] != 0).any() for x in with_gradients(ours, leaves, valid, upstream))


def test_no_gradient_for_masks_that_ask_for_none():
    leaves, valid, upstream = inputs(2, 1, (2, 2), 20, 4, 0.5)
    expected = with_gradients(ours, leaves, valid, upstream)
    leaves[3] = leaves[3].detach()
    out = ours(leaves, valid)
    found = torch.autograd.grad(out, leaves[:3], upstream)
    for a, b in zip(found, expected[1:4], strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))]
        )
        return result


def test_no_tensor_of_length_squared_exists():
    """Inside the operator, and among what autograd keeps; the full matrix has them, so the watch can see."""
    length = 512
    leaves, valid, upstream = inputs(0, 1, (2, 2), length, 4, 0.5, dtype=torch.float32)
    context, arguments = training_context(leaves[3], valid), [x.detach() for x in leaves[:3]]
    with strips_of(32, scores=1), Largest() as inside:
        saved = blocks.forward(*arguments, context.packing, SCALING, MAX_EXPONENT)
        blocks.backward(upstream, *arguments, context.packing, *saved, SCALING, True)
    assert 32 * length // 2 <= inside.numel <= 32 * 2 * length
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        with Largest() as around:
            ours(leaves, valid)
    assert max(kept) <= 2 * 4 * length and around.numel <= 2 * 4 * length
    with Largest() as whole:
        plain(leaves, valid)
    assert whole.numel >= length * length


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    leaves, valid, upstream = inputs(7, 2, (4, 2), 24, 8, 0.5, "left", torch.float32)

    def attend(query, key, value, keep):
        return ours([query * 1.0, key, value, keep], valid) * 2.0

    expected = [attend(*leaves), *torch.autograd.grad(attend(*leaves), leaves, upstream)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = [compiled(*leaves), *torch.autograd.grad(compiled(*leaves), leaves, upstream)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_keep_torchs_rules():
    leaves, valid, _ = inputs(7, 2, (4, 2), 24, 8, 0.5, "left", torch.float32)
    packing = training_context(leaves[3], valid).packing
    torch.library.opcheck(torch.ops.dynllava.masked_softmax.default, (*leaves, packing, SCALING))


def test_autocast_takes_its_dtype_and_adds_up_in_float32():
    leaves, valid, upstream = inputs(8, 2, (2, 2), 60, 8, 0.5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(leaves, valid)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    assert out.dtype == torch.bfloat16 and {x.dtype for x in gradients} == {torch.float32}
    rounded = [x.detach().bfloat16().requires_grad_() for x in leaves[:3]] + [leaves[3]]
    torch.testing.assert_close(out, ours(rounded, valid), rtol=0, atol=0)


def test_processors_take_strips():
    assert implementation(torch.zeros(1, 1, 1, 16)) is blocks


# In the model.


def training_batch(seed=0, left=False):
    rng = random.Random(seed)
    samples = [random_sample(rng, 1, 5), random_sample(rng, 1, 12)]
    answers = [[rng.randrange(3, 80) for _ in range(n)] for n in (7, 5)]
    return batch_of(samples, left=left, labels=answers)


def loss_and_gradients(model, batch, **options):
    model.train()
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.23 renames checkpointing's switch
def test_training_is_the_same_under_every_way_to_run_it():
    """Padding at either end; gradient checkpointing; eager attention in the layers before the gate."""
    model = random_model(mode="image_text")
    expected = loss_and_gradients(model, training_batch())
    assert len(expected) > 50
    model.gradient_checkpointing_enable()
    variants = {"checkpointing": loss_and_gradients(model, training_batch())}
    model.gradient_checkpointing_disable()
    variants["left padding"] = loss_and_gradients(model, training_batch(left=True))
    eager = random_model(mode="image_text", attention="eager")
    variants["eager"] = loss_and_gradients(eager, training_batch())
    for name, found in variants.items():
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_no_mask_of_length_squared_in_training():
    model = random_model(mode="image_text").train()
    batch = training_batch()
    length = batch["input_ids"].shape[1]
    seen = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    for left, shape in ((False, None), (True, (2, 1, length, length))):
        seen.clear()
        model(**training_batch(left=left))
        masks = [None if mask is None else tuple(mask.shape) for mask in seen]
        assert masks == [shape] * 2 + [None] * 3
        assert all(mask is None or mask.dtype == torch.bool for mask in seen)


def test_a_layer_compiles_whole():
    torch._dynamo.reset()
    llm = random_model(mode="image_text").train().model.language_model
    use_sparse_attention(llm.config)
    layer = llm.layers[3]
    hidden = torch.randn(2, 20, 32)
    keep = (torch.rand(2, 20) < 0.5).float().requires_grad_()
    context = training_context(keep, torch.ones(2, 20, dtype=torch.bool))
    positions = llm.rotary_emb(hidden, position_ids=torch.arange(20)[None])
    options = dict(attention_mask=None, position_embeddings=positions, sparse=SparseCall(context=context))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, **options), layer(hidden, **options))


def test_dropout_is_refused():
    model = random_model(mode="image_text").train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"attention_dropout: 0\.1 is not supported by the masked softmax"):
        model(**training_batch())
