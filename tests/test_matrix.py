"""Configurations drawn at will, of family, policy and batch: the same thing computed in every way the model has."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.families.oracle import with_tokens
from tests.families.ours import answers_of, model_of, stock_of
from tests.property_tests import examples
from tests.test_families import CLOSE, batch_for, drawn_shapes, every_family, step_by_step, uncached

STEPS = 4
shares = st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])
# What each argument that says how much stays is called, "" where there is none.
IMAGE = {
    **dict.fromkeys(("image", "random", "fastv", "dart", "cdpruner", "divprune"), "keep"),
    **dict.fromkeys(("pyramiddrop", "v2drop", "sparsevlm"), "keep"),
}
SEVERAL_GATES = ("pyramiddrop", "v2drop", "sparsevlm")  # their layers are no cache policy's
OUTPUT = {"text": "", "random_text": "r", "structure": ""}
CACHE = {"h2o": "r", "snapkv": "r", "pyramidkv": "r"}


@st.composite
def policies(draw: Any) -> tuple[str, int, float]:
    """A policy as a user writes it, the layer of its gate, and the least share of anything that it keeps."""
    layer, arguments = draw(st.integers(1, 3)), {}
    shares = {}
    for methods, none in ((IMAGE, 1), (OUTPUT, 3), (CACHE, 6)):
        name = draw(st.sampled_from([None] * none + list(methods)))
        if name is None or (name in CACHE and any(gates in shares for gates in SEVERAL_GATES)):
            continue
        share = draw(st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]))
        shares[name] = share if methods[name] else 0.0
        arguments[name] = {methods[name]: share} if methods[name] else {}
        if name == "fastv":
            arguments[name]["k"] = layer
    alone = len(shares) == 1
    written = [
        f"{key if alone else f'{name}.{key}'}={value}"
        for name, given in arguments.items()
        for key, value in given.items()
    ]
    return ",".join(["+".join(shares) or "full", *written]), layer, min(shares.values(), default=1.0)


def padded_right(batch: dict) -> dict:
    """The same batch with its padding behind each prompt."""
    order = batch["attention_mask"].logical_not().long().argsort(dim=1, stable=True)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {**batch, **{name: batch[name].gather(1, order) for name in names if name in batch}}


@every_family
@examples(4)
@given(policy=policies(), shapes=drawn_shapes, right=st.booleans(), eager=st.booleans())
@torch.no_grad()
def test_a_drawn_configuration_is_one_thing(family, policy, shapes, right, eager):
    """Batch = single = cached = static = uncached = scored = generated, greedy and in beams; all kept = the stock class."""
    (text, layer, least), (seed, sizes) = policy, shapes
    model = model_of(family, "eager" if eager else "sdpa")
    model.set_sparsity(policy=text, sparse_layer=layer)
    sequential = model._llm.policy.sequential
    batch, alone, _ = batch_for(family, sizes, seed)
    answers = answers_of(family, len(sizes), STEPS, seed)
    given_batch = padded_right(batch) if right else batch
    together, cache = step_by_step(model, given_batch, answers)
    if not sequential:
        static, _ = step_by_step(model, given_batch, answers, model.new_cache("static"))
        torch.testing.assert_close(static, together, **CLOSE)
    options = dict(do_sample=False, max_new_tokens=3, min_new_tokens=3)
    width = batch["input_ids"].shape[1]
    greedy = model.generate(**given_batch, **options)[:, width:]
    beams = model.generate(**given_batch, **options, num_beams=2)[:, width:]
    if not sequential:
        assert torch.equal(model.generate(**given_batch, **options, use_cache=False)[:, width:], greedy)
    for row, sample in enumerate(alone):
        own, own_cache = step_by_step(model, sample, answers[row : row + 1])
        torch.testing.assert_close(together[row], own[0], **CLOSE)
        assert torch.equal(cache.kept_lengths()[:, row], own_cache.kept_lengths()[:, 0])
        longer = with_tokens(sample, answers[row].tolist())
        labels = torch.full_like(longer["input_ids"], -100)
        labels[:, -STEPS:] = answers[row]
        expected = own[0].log_softmax(-1).gather(-1, answers[row][:, None])[:, 0]
        torch.testing.assert_close(model.score(**longer, labels=labels)[0, -STEPS:], expected, **CLOSE)
        if not sequential:
            out = uncached(model, sample, answers[row, : STEPS - 1])
            torch.testing.assert_close(out.logits[0, -1], own[0, -1], **CLOSE)
        assert torch.equal(model.generate(**sample, **options)[0, -3:], greedy[row])
        assert torch.equal(model.generate(**sample, **options, num_beams=2)[0, -3:], beams[row])
        if least == 1.0:
            stock = stock_of(family)(**longer).logits[0, -STEPS - 1 : -1]
            torch.testing.assert_close(own[0], stock, **CLOSE)
