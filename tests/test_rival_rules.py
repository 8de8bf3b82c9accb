"""The rules of PyramidDrop, DART, FasterVLM, VisPruner and SnapKV against plain, slow versions of them; budgets in tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape, decode_step_flops, prefill_flops
from dynllava_plugin.policies.contexts import context_of
from dynllava_plugin.policies.dart import DART
from dynllava_plugin.policies.fastervlm import FasterVLM
from dynllava_plugin.policies.heavy_hitters import share_of
from dynllava_plugin.policies.points import Gate, TokenLayout
from dynllava_plugin.policies.registry import check_policy, policy_changes
from dynllava_plugin.policies.vispruner import VisPruner
from dynllava_plugin.sparsity.config import SparsityConfig
from tests.families.checkpoints import FAMILIES
from tests.families.oracle import last_row_attention, oracle_logits, with_tokens
from tests.families.ours import answers_of, model_of, stock_of
from tests.property_tests import examples
from tests.test_equivalence import CLOSE
from tests.test_families import SIZES, batch_for, units
from tests.test_families import step_by_step as step_by_step_of_family
from tests.test_policy_rules import MODEL, drawn, patches_of, plain_cls_attention, seeds, some_samples, turn
from tests.tiny_random import batch_of


def policy_named(text, layers=32):
    return check_policy(SparsityConfig().replace(**policy_changes({"policy": text})), layers)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pyramiddrop_ranks_what_is_left_at_each_gate(family):
    """The stock model under masks: at each gate floor(ratio^j * N) of an image's tokens, by the last row of the layer before."""
    model, stock = model_of(family), stock_of(family)
    model.set_sparsity(policy="pyramiddrop,ratio=0.6")
    assert model._llm.policy.layers == (1, 2, 3)
    sample = batch_for(family, SIZES)[1][1]
    answers = answers_of(family, 1, 4, 1)
    logits, cache = step_by_step_of_family(model, sample, answers)
    length = sample["input_ids"].shape[1]
    images = units(model, family, SIZES[1], sample)
    left, keeps, held = images, {}, [length + 3]
    for gate in (1, 2, 3):
        row = last_row_attention(stock, sample, gate - 1, dict(keeps)).mean(0)
        counts = [max(1, math.floor(0.6**gate * len(places) + 1e-9)) for places in images]
        left = [
            torch.tensor(sorted(sorted(places.tolist(), key=lambda place, row=row: -float(row[place]))[:n]))
            for places, n in zip(left, counts, strict=True)
        ]
        keep = torch.ones(length, dtype=torch.bool)
        keep[torch.cat(images)] = False
        keep[torch.cat(left)] = True
        keeps[gate] = keep
        held.append(int(keep.sum()) + 3)
    assert torch.equal(model(**sample).image_keep[0], keeps[3][torch.cat(images)])
    assert cache.kept_lengths()[:, 0].tolist() == held
    more = torch.ones(3, dtype=torch.bool)
    longer = with_tokens(sample, answers[0, :-1].tolist())
    keeps = {gate: torch.cat([keep, more]) for gate, keep in keeps.items()}
    torch.testing.assert_close(
        logits[0], oracle_logits(stock, longer, keeps=keeps)[length - 1 :], rtol=1e-4, atol=2e-4
    )


@examples(25)
@given(
    seed=seeds, tokens=st.integers(1, 12), text=st.integers(1, 9), keep=st.floats(0.05, 1), pivots=st.integers(1, 5)
)  # fmt: skip
def test_dart_takes_what_is_least_like_its_pivots(seed, tokens, text, keep, pivots):
    """Two samples of one image each; the second has a padded column and an output token, which are no pivots."""
    length = 1 + tokens + text
    hidden = drawn(seed, 2, length, 6)
    hidden[1, 0] = hidden[1, -1] = 100.0
    valid, image, output = (torch.zeros(2, length, dtype=torch.bool) for _ in range(3))
    valid[:] = True
    valid[1, 0] = False
    image[:, 1 : 1 + tokens] = True
    output[1, -1] = True
    layout = TokenLayout(
        image_mask=image, image_lengths=(tokens, tokens), image_rows=(0, 1),
        image_index=image.flatten().nonzero()[:, 0], output_mask=output, output_start=length - 1,
    )  # fmt: skip
    found = DART(keep=keep, pivots=pivots).keep_image(Gate(hidden, valid, valid.long(), layout, layer=2)).keep
    for row in range(2):
        states = hidden[row].double()

        def norm(i, states=states):
            return -float(states[i].abs().sum())

        budget = max(1, math.floor(keep * tokens + 1e-9))
        own = sorted(range(1, 1 + tokens), key=norm)[: min(pivots, budget)]
        words = [i for i in (0, *range(1 + tokens, length)) if valid[row, i] and not output[row, i]]
        words = sorted(words, key=norm)[: len(own)]
        words += own[len(words) :][: min(len(own), length) - len(words)]
        taken, turns = list(own), [*own, *words]
        for number, pivot in enumerate(turns):
            share = (budget - len(own)) // len(turns) + (number < (budget - len(own)) % len(turns))
            left = [i for i in range(1, 1 + tokens) if i not in taken]
            left.sort(key=lambda i, p=pivot, s=states: float(torch.cosine_similarity(s[i], s[p], dim=0)))
            taken += left[:share]
        assert len(taken) == budget
        assert (found[row].nonzero()[:, 0] + 1).tolist() == sorted(taken)


@examples(20)
@given(seed=seeds, tokens=st.integers(2, 40), n=st.integers(1, 30))
def test_fastervlm_keeps_what_the_class_token_attends_to(seed, tokens, n):
    patches = patches_of(seed, tokens)
    reduced = FasterVLM(n=n).reduce_patches(patches)
    for image in range(2):
        attention = plain_cls_attention(patches.query[image], patches.key[image], 2)
        ranked = sorted(range(tokens), key=lambda i, a=attention: -float(a[i]))
        assert reduced.keep[image].nonzero()[:, 0].tolist() == sorted(ranked[:n])
    assert torch.equal(reduced.tokens, patches.hidden)


@examples(20)
@given(
    seed=seeds, tokens=st.integers(2, 60), n=st.integers(1, 30), important=st.sampled_from([0.2, 0.5, 1.0])
)
def test_vispruner_removes_duplicates_of_the_rest(seed, tokens, n, important):
    patches = patches_of(seed, tokens)
    reduced = VisPruner(n=n, important=important).reduce_patches(patches)
    kept = min(n, tokens)
    for image in range(2):
        attention = plain_cls_attention(patches.query[image], patches.key[image], 2)
        ranked = sorted(range(tokens), key=lambda i, a=attention: -float(a[i]))
        chosen, rest = ranked[: int(kept * important)], ranked[int(kept * important) :]
        states = patches.hidden[image].double()
        while len(rest) > kept - len(chosen):
            first, second = rest[::2], rest[1::2]
            if not second:
                rest = []
                break
            like = {
                i: max(float(torch.cosine_similarity(states[i], states[j], dim=0)) for j in second)
                for i in first
            }
            gone = min(8, len(rest) - (kept - len(chosen)), len(first))
            rest = sorted(first, key=lambda i, like=like: -like[i])[gone:] + second
        assert len(chosen) + len(rest) == kept
        assert reduced.keep[image].nonzero()[:, 0].tolist() == sorted(chosen + rest)


class PlainSnap:
    """One head of one layer: the prompt whole, then what its window looked at and everything that came behind."""

    def __init__(self, r, window, kernel):
        self.r, self.window, self.kernel, self.held = r, window, kernel, []

    def attend(self, queries, keys, values, scale):
        prompt = not self.held
        new = list(zip(keys, values, strict=True))
        rows, outputs = [], []
        for i in range(len(new)):
            visible = self.held + new[: i + 1]
            weights = [
                torch.softmax(torch.stack([key @ query for key, _ in visible]) * scale, 0)
                for query in queries[:, i]
            ]
            outputs.append(
                torch.stack([sum(w * v for w, (_, v) in zip(row, visible, strict=True)) for row in weights])
            )
            rows.append(sum(weights) / len(weights))
        self.held += new
        if prompt and self.r is not None:
            budget = max(1, math.floor(self.r * len(new) + 1e-6))
            window = min(self.window, (budget + 1) // 2)
            before = len(new) - window
            seen = [sum(float(row[j]) for row in rows[before:]) for j in range(before)]
            near = self.kernel // 2
            pooled = [sum(seen[max(0, j - near) : j + near + 1]) / self.kernel for j in range(before)]
            best = sorted(range(before), key=lambda j: -pooled[j])[: budget - window]
            self.held = [new[j] for j in sorted(best)] + new[before:]
        return torch.stack(outputs, 1)


def plain_snapkv(sample, tokens, shares, window, kernel):
    """[T + 1, V] logits behind the prompt and each of `tokens`, and how many each layer holds in the end."""
    llm = MODEL._llm
    heads = [[PlainSnap(share, window, kernel) for _ in range(2)] for share in shares]
    position, logits = 0, []
    for ids in [sample.ids, *[[token] for token in tokens]]:
        ids = torch.tensor([ids])
        hidden = MODEL.get_input_embeddings()(ids)
        image = ids[0] == MODEL.config.image_token_id
        if image.any():
            hidden[0, image] = torch.cat(list(MODEL.model.get_image_features(sample.images).pooler_output))
        length = ids.shape[1]
        cos, sin = llm.rotary_emb(hidden, position_ids=torch.arange(position, position + length)[None])
        position += length
        for layer, layer_heads in zip(llm.layers, heads, strict=True):
            states, attention = layer.input_layernorm(hidden)[0], layer.self_attn
            query = attention.q_proj(states).view(length, 4, 8)
            key = attention.k_proj(states).view(length, 2, 8)
            value = attention.v_proj(states).view(length, 2, 8)
            mixed = []
            for group, head in enumerate(layer_heads):
                queries = torch.stack([turn(query[:, 2 * group + i], cos[0], sin[0]) for i in range(2)])
                keys = turn(key[:, group], cos[0], sin[0])
                mixed.append(head.attend(queries, keys, value[:, group], 8**-0.5))
            hidden = hidden + attention.o_proj(torch.cat(mixed).transpose(0, 1).reshape(1, length, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(MODEL._logits(llm.norm(hidden))[0, -1])
    return torch.stack(logits), [len(layer_heads[0].held) for layer_heads in heads]


@pytest.mark.parametrize(("r", "window", "kernel"), [(0.3, 3, 3), (0.6, 32, 5)])
def test_snapkv_cuts_the_prompt_as_the_plain_version_does(r, window, kernel):
    from tests.test_equivalence import step_by_step

    rng, samples = some_samples(21)
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(5)] for _ in samples])
    MODEL.set_sparsity(policy="snapkv", r=r, window=window, kernel=kernel, start_layer=2)
    logits, cache = step_by_step(MODEL, batch_of(samples), answers)
    MODEL.set_sparsity(policy="full")
    full, _ = step_by_step(MODEL, batch_of(samples), answers)
    assert (full - logits).abs().max() > 1e-2, "letting go must matter here"
    for row, sample in enumerate(samples):
        with torch.no_grad():
            expected, held = plain_snapkv(
                sample, answers[row, :-1].tolist(), [None, None, r, r, r], window, kernel
            )
        torch.testing.assert_close(logits[row], expected, **CLOSE)
        assert cache.kept_lengths()[:, row].tolist() == held


def plain_most(total, tokens, layers, gates, shares):
    """Each gate's tokens, of every x at which one of the floors of `shares(x)` steps the last that fits: a plain search."""
    found = None
    for x in sorted(shares):
        left = [max(1, math.floor(part * total + 1e-9)) for part in shares[x]]
        present = [total] * gates[0]
        for start, end, n in zip(gates, [*gates[1:], layers], left, strict=True):
            present += [n] * (end - start)
        if sum(present) <= tokens * layers:
            found = tuple(left)
    return found


@examples(30)
@given(
    total=st.integers(2, 120), budget=st.floats(0.3, 1), steps=st.lists(st.integers(1, 10), min_size=2, max_size=2),
    kind=st.sampled_from(["fastv", "pyramiddrop", "schedule"]),
)  # fmt: skip
def test_tokens_solve_for_a_policys_parameters(total, budget, steps, kind):
    tokens, places = round(budget * total, 2), range(1, total + 1)
    first, last = sorted((part / 10 for part in steps), reverse=True)
    text, gates, shares = {
        "fastv": ("fastv,k=2", [2], {n: [n / total] for n in places}),
        "pyramiddrop": ("pyramiddrop,at=1-3-5", [1, 3, 5], {
            x: [x, x**2, x**3] for n in places for x in ((n / total) ** (1 / gate) for gate in (1, 2, 3))
        }),
        "schedule": (f"schedule,2:fastv:{first},6:random:{last}", [2, 6], {
            x: [min(1, x * first), min(1, x * last)] for n in places for x in (n / total / first, n / total / last)
        }),
    }[kind]  # fmt: skip
    expected = plain_most(total, tokens, 12, gates, shares)
    image = policy_named(f"{text},tokens={tokens}", 12).image if tokens >= 1 else None
    if image is None:
        return
    if expected is None:
        with pytest.raises(UserError, match=f"{kind}: no setting of it leaves tokens="):
            image.left(total)
    else:
        assert image.left(total) == expected


@pytest.mark.parametrize("tokens", [192, 144, 128, 64])
@pytest.mark.parametrize(
    "name",
    ["fastv", "image", "image_text", "random", "pyramiddrop,at=2-8-16", "dart", "visionzip", "divprune"],
)
def test_tokens_are_the_mean_over_layers(name, tokens):
    """No more than asked for, and one token more in the end would be more than that."""
    policy = policy_named(f"{name},tokens={tokens}")
    kept = policy.kept_tokens(576)
    found = policy.image_tokens(576, kept, 32)
    assert tokens - 1 <= found <= tokens
    policy.check_image(576)


def test_the_papers_counts():
    assert policy_named("pyramiddrop,ratio=0.5").image_tokens(576, 72, 32) == 270  # its 8, 16, 24 of 32
    learned = policy_named("image,tokens=144")
    assert learned.kept_tokens(576) == 115
    page = {"fastv": 152, "image": 166, "pyramiddrop": 9, "divprune": 192}  # docs/policies.md
    assert {name: policy_named(f"{name},tokens=192").kept_tokens(576) for name in page} == page
    assert policy_named("pyramiddrop,at=2-8-16,tokens=64").image_tokens(576, 1, 32) <= 64


@pytest.mark.parametrize(
    ("text", "total", "message"),
    [
        ("fastv,k=3,tokens=40", 576, "fastv: no setting of it leaves tokens=40 of an image's 576; the nearest is 54.9062"),
        ("pyramiddrop,tokens=64", 576, "pyramiddrop: no setting of it leaves tokens=64 .* the nearest is 144.75"),
        ("visionzip,n=1000", 64, "visionzip: n=1000, but an image has 64 tokens"),
        ("divprune,tokens=192", 64, "divprune: tokens=192, but an image has 64 tokens"),
        ("fastv+text,k=2,tokens=192", 64, "fastv: tokens=192, but an image has 64 tokens"),
    ],
)  # fmt: skip
def test_a_budget_that_nothing_reaches_is_one_line(text, total, message):
    with pytest.raises(UserError, match=message) as error:
        policy_named(text).check_image(total)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visionzip,n=1000", "visionzip: n=1000, but an image has 16 tokens"),
        ("fastv,tokens=3", "no setting of it leaves tokens=3 of an image's 16; the nearest is 10"),
        ("fastv,tokens=12,keep=0.5", "fastv: keep and tokens say the same thing"),
        ("fastv,tokens=x", "fastv: tokens='x' is not a number of at least 1"),
        ("fastv,num_layers=3", "fastv: no argument 'num_layers'"),
        ("pyramiddrop,at=3-2", "pyramiddrop: at='3-2' is not layers in order, such as 8-16-24"),
        ("pyramiddrop,at=2-9", r"pyramiddrop: layer 9 is outside the model, which has layers 0\.\.4"),
        ("pyramiddrop,stages=5", "pyramiddrop: stages=5 of 5 layers puts a gate at layer 0"),
        ("pyramiddrop,ratio=0", r"pyramiddrop: ratio=0 is outside \(0, 1\]"),
        ("pyramiddrop+h2o", r"pyramiddrop has gates at several layers, h2o's cache begins at one"),
        ("dart,pivots=0", "dart: pivots=0 is not a positive integer"),
        ("vispruner,important=2", r"vispruner: important=2 is outside \(0, 1\]"),
        ("snapkv,kernel=4", "snapkv: kernel=4 is not an odd positive integer"),
        ("snapkv+h2o", "both decide what leaves the cache"),
    ],
)
def test_what_is_wrong_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        MODEL.set_sparsity(policy=text)
    assert "\n" not in str(error.value)


SHAPE = DecoderShape(8, 16, 32, 4, 2, 100, 8, 16, 1)


def plain_prefill(tokens):
    """Each layer's matrices over its tokens and two products of width d for each pair that may attend."""
    total = 2 * SHAPE.hidden * SHAPE.vocab
    for n in tokens:
        total += 2 * n * SHAPE.layer_parameters + 4 * SHAPE.hidden * n * (n + 1) / 2
    return total


def test_costs_of_several_gates():
    """Gates at 2, 4 and 6 of 8 layers; with an output gate at 3 between them."""
    policy = policy_named("pyramiddrop,ratio=0.5", 8)
    context = context_of(policy, 8, 40, 5, 7)
    assert prefill_flops(SHAPE, context) == plain_prefill([47, 47, 27, 27, 17, 17, 12, 12])
    assert context.held(8, 4) == 2 * (47 + 27 + 17 + 12) + 8 * 4
    with_text = policy_named("pyramiddrop+structure,ratio=0.5,layer=3", 8)
    context = context_of(with_text, 8, 40, 5, 7)
    assert context.held(8, 4) == 2 * (47 + 27 + 17 + 12) + 3 * 4 + 5 * 2
    expected = sum(
        2 * SHAPE.layer_parameters + 4 * SHAPE.hidden * (n + output + 1)
        for n, output in zip([47, 47, 27, 27, 17, 17, 12, 12], [4] * 3 + [2] * 5, strict=True)
    )
    assert decode_step_flops(SHAPE, context, 4) == expected + 2 * SHAPE.hidden * SHAPE.vocab


def test_a_cache_holds_the_whole_of_its_share():
    """Of 100 tokens 0.59 are 59, and not 58 because 0.59 * 100 is less in the numbers of a device."""
    tokens = torch.arange(1, 3001)
    for percent in range(1, 101):
        expected = (percent * tokens).div(100, rounding_mode="floor").clamp(min=1)
        assert torch.equal(share_of(tokens, percent / 100), expected), percent


def test_costs_of_snapkv():
    context = context_of(policy_named("snapkv,r=0.5", 8), 8, 40, 40, 8)
    assert prefill_flops(SHAPE, context) == plain_prefill([48] * 8)
    assert context.held(8, 10) == 2 * 58 + 6 * (24 + 10)
