"""Each published rule against a plain, slow version of it: loops over tokens, one image, one head at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.policies.base import Patches
from dynllava_plugin.policies.cdpruner import CDPruner, greedy_map
from dynllava_plugin.policies.divprune import DivPrune
from dynllava_plugin.policies.downsample import Downsample
from dynllava_plugin.policies.prumerge import PruMergePlus
from dynllava_plugin.policies.visionzip import VisionZip
from tests.property_tests import examples
from tests.test_equivalence import CLOSE, step_by_step
from tests.tiny_random import TOKENS_PER_IMAGE, batch_of, random_model, random_sample

MODEL = random_model()
seeds = st.integers(0, 2**20)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_samples(seed):
    rng = random.Random(seed)
    return rng, [random_sample(rng, images, text) for images, text in ((1, 3), (2, 7), (0, 4))]


def no_question():
    raise AssertionError("this rule doesn't look at the question")


def test_fastv_keeps_what_plain_attention_ranks_first():
    """The plain version: every attention weight of layer k-1 in eager mode."""
    _, samples = some_samples(6)
    MODEL.set_sparsity(policy="fastv,k=2,keep=0.4")
    for sample in samples[:2]:
        llm = MODEL._llm
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            kept = MODEL(ids, pixel_values=sample.images).image_keep[0]
            embeds = MODEL.get_input_embeddings()(ids)
            image = ids[0] == MODEL.config.image_token_id
            embeds[0, image] = torch.cat(list(MODEL.model.get_image_features(sample.images).pooler_output))
            length = len(sample.ids)
            cos, sin = llm.rotary_emb(embeds, position_ids=torch.arange(length)[None])
            causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            hidden = llm.layers[0](embeds, attention_mask=causal, position_embeddings=(cos, sin))
            attention = llm.layers[1].self_attn
            states = llm.layers[1].input_layernorm(hidden)
            query = attention.q_proj(states).view(length, 4, 8)
            key = attention.k_proj(states).view(length, 2, 8)
            weights = torch.zeros(length)
            for head in range(4):
                q = turn(query[:, head], cos[0], sin[0])[-1]
                k = turn(key[:, head // 2], cos[0], sin[0])
                weights += torch.softmax(k @ q / 8**0.5, 0) / 4
        ranked = weights[image].view(-1, TOKENS_PER_IMAGE)
        for index, image_weights in enumerate(ranked):
            expected = sorted(image_weights.argsort(descending=True)[:6].tolist())
            mine = kept[index * TOKENS_PER_IMAGE : (index + 1) * TOKENS_PER_IMAGE]
            assert mine.nonzero()[:, 0].tolist() == expected


def turn(states, cos, sin):
    """Rotary embedding as in the paper's code: halves rotated."""
    half = states.shape[-1] // 2
    return states * cos + torch.cat([-states[:, half:], states[:, :half]], -1) * sin


@examples(15)
@given(seed=seeds, side=st.integers(2, 7), share=st.floats(0.05, 1))
def test_downsample_averages_cells(seed, side, share):
    policy = Downsample(r=share)
    features = drawn(seed, 2, side * side, 3)
    reduced = policy.reduce_tokens(features, no_question)
    rows, columns = policy.grid(side * side)
    assert rows * columns == policy.kept_tokens(side * side) <= max(1, math.floor(share * side * side + 1e-9))
    assert (reduced.keep.sum(1) == rows * columns).all()
    for image in range(2):
        expected = []
        for i in range(rows):
            for j in range(columns):
                # A cell spans the source rows and columns that its share of the grid touches.
                ys = range(i * side // rows, -(-(i + 1) * side // rows))
                xs = range(j * side // columns, -(-(j + 1) * side // columns))
                cell = [features[image, y * side + x] for y in ys for x in xs]
                expected.append(sum(cell) / len(cell))
        torch.testing.assert_close(reduced.tokens[image][reduced.keep[image]], torch.stack(expected))


@examples(15)
@given(seed=seeds, tokens=st.integers(1, 14), share=st.floats(0.05, 1))
def test_divprune_takes_the_farthest(seed, tokens, share):
    features = drawn(seed, 2, tokens, 4)
    reduced = DivPrune(r=share).reduce_tokens(features, no_question)
    for image, keep in zip(features.double(), reduced.keep, strict=True):

        def distance(i, j, image=image):
            return 1 - float(image[i] @ image[j] / (image[i].norm() * image[j].norm()))

        taken: list[int] = []
        for _ in range(max(1, math.floor(share * tokens + 1e-9))):
            left = [i for i in range(tokens) if i not in taken]
            against = taken or range(tokens)
            nearest = {i: min((distance(i, j) for j in against if j != i), default=0) for i in left}
            taken.append(max(left, key=nearest.__getitem__))
        assert keep.nonzero()[:, 0].tolist() == sorted(taken)
    assert reduced.tokens is None, "tokens stay as they are"


@examples(15)
@given(seed=seeds, tokens=st.integers(2, 10), size=st.integers(1, 5))
def test_cdpruner_raises_the_determinant_most(seed, tokens, size):
    """Each item taken is the one with which the kernel's minor has the largest determinant."""
    features, question = drawn(seed, 1, tokens, 6), drawn(seed + 1, 1, 6)
    reduced = CDPruner(n=size).reduce_tokens(features, lambda: question)
    unit = [token / token.norm() for token in features[0].double()]
    asked = question[0].double() / question[0].double().norm()
    cosines = [float(token @ asked) for token in unit]
    low, high = min(cosines), max(cosines)
    relevance = [(value - low + 1e-6) / (high - low + 1e-6) for value in cosines]
    kernel = torch.tensor(
        [
            [relevance[i] * float(unit[i] @ unit[j]) * relevance[j] for j in range(tokens)]
            for i in range(tokens)
        ],
        dtype=torch.float64,
    )
    taken: list[int] = []
    for _ in range(min(size, tokens)):
        left = [i for i in range(tokens) if i not in taken]
        minors = {i: float(torch.linalg.det(kernel[[*taken, i]][:, [*taken, i]])) for i in left}
        if max(minors.values()) < 1e-9:
            return  # nothing raises it any more: any choice will do
        taken.append(max(left, key=minors.__getitem__))
    assert reduced.keep[0].nonzero()[:, 0].tolist() == sorted(taken)
    torch.testing.assert_close(reduced.score[0], torch.tensor(relevance), **CLOSE)


def test_greedy_map_survives_a_kernel_of_low_rank():
    same = torch.ones(1, 6, 6)
    assert greedy_map(same, 4)[0].tolist() == [True] * 4 + [False] * 2


def patches_of(seed, tokens, width=8, heads=2):
    return Patches(
        drawn(seed, 2, tokens, width), drawn(seed + 1, 2, width), drawn(seed + 2, 2, tokens + 1, width) * 2,
        drawn(seed + 3, 2, tokens + 1, width) * 2, heads,
    )  # fmt: skip


def plain_cls_attention(query, key, heads):
    width = len(query[0]) // heads
    total = torch.zeros(len(key), dtype=torch.float64)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        total += torch.softmax(key[:, part].double() @ query[0, part].double() / width**0.5, 0) / heads
    return total[1:]


@examples(15)
@given(seed=seeds, tokens=st.integers(4, 20), n=st.integers(1, 12), packed=st.booleans())
def test_visionzip_merges_what_the_class_token_does_not_look_at(seed, tokens, n, packed):
    patches = patches_of(seed, tokens)
    policy = VisionZip(n=n, positions="packed" if packed else "original")
    reduced = policy.reduce_patches(patches)
    if n >= tokens:
        assert torch.equal(reduced.tokens, patches.hidden) and reduced.keep.all()
        return
    contextual = policy.merged_tokens(n)
    for image in range(2):
        attention = plain_cls_attention(patches.query[image], patches.key[image], 2)
        ranked = sorted(range(tokens), key=lambda i: -float(attention[i]))
        dominant = sorted(ranked[: n - contextual - 1])
        others = [i for i in range(tokens) if i not in dominant]
        targets = others[:: max(1, len(others) // max(contextual, 1))][:contextual]
        keys = patches.key[image, 1:].view(tokens, 2, 4).mean(1)
        joined: dict[int, list[int]] = {target: [] for target in targets}
        for i in others:
            if i not in targets and targets:
                near = max(targets, key=lambda t: float(torch.cosine_similarity(keys[i], keys[t], dim=0)))
                joined[near].append(i)
        hidden = patches.hidden[image]
        merged = {
            t: hidden[t] + (sum(hidden[i] for i in members) / len(members) if members else 0)
            for t, members in joined.items()
        }
        expected = [patches.cls[image], *(hidden[i] for i in dominant), *(merged[t] for t in targets)]
        free = next(i for i in range(tokens) if i not in dominant and i not in targets)
        places = [free, *dominant, *targets]
        assert reduced.keep[image].nonzero()[:, 0].tolist() == sorted(places)
        if not packed:
            expected = [
                token for _, token in sorted(zip(places, expected, strict=True), key=lambda pair: pair[0])
            ]
        torch.testing.assert_close(reduced.tokens[image][reduced.keep[image]], torch.stack(expected), **CLOSE)


@examples(15)
@given(
    seed=seeds,
    tokens=st.integers(6, 24),
    keep=st.sampled_from([None, 0.1, 0.25, 0.5]),
    near=st.integers(1, 9),
)
def test_prumerge_keeps_outliers_and_merges_by_keys(seed, tokens, keep, near):
    patches = patches_of(seed, tokens)
    policy = PruMergePlus(keep=keep, neighbours=near)
    reduced = policy.reduce_patches(patches)
    for image in range(2):
        attention = plain_cls_attention(patches.query[image], patches.key[image], 1)
        ranked = sorted(range(tokens), key=lambda i: -float(attention[i]))
        if keep is None:
            ordered = sorted(attention.tolist())

            def quantile(q, ordered=ordered):
                at = q * (tokens - 1)
                low = math.floor(at)
                return ordered[low] + (at - low) * (ordered[min(low + 1, tokens - 1)] - ordered[low])

            bound = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
            count = max(1, sum(value > bound for value in attention.tolist()))
            chosen = ranked[:count]
            spacing = max(1, int(int(tokens / count) / 3))
            chosen += [i for i in range(0, tokens - 1, spacing) if i not in chosen]
        else:
            budget = max(1, math.floor(keep * tokens))
            inner = budget - (budget > 1)
            chosen = ranked[: max(1, inner // 4)]
            free = [i for i in range(tokens) if i not in chosen]
            rest = inner - len(chosen)
            chosen += [free[(2 * i + 1) * len(free) // (2 * rest)] for i in range(rest)]
        hidden, keys = patches.hidden[image].double(), patches.key[image, 1:].double()
        expected = []
        for i in chosen:
            like = [
                (float(torch.cosine_similarity(keys[i], keys[j], dim=0)), j) for j in range(tokens) if j != i
            ]
            best = [j for _, j in sorted(like, reverse=True)[:near]]
            expected.append(hidden[i] + sum(attention[j] * hidden[j] for j in best))
        others = [i for i in range(tokens) if i not in chosen]
        if others and (keep is None or budget > 1):
            expected.append(sum(attention[j] * hidden[j] for j in others))
        found = reduced.tokens[image][reduced.keep[image]]
        torch.testing.assert_close(found.double(), torch.stack(expected), **CLOSE)
        if keep is not None:
            assert len(found) == budget


class PlainHead:
    """One head of one layer as H2O describes it: a list of what is held, one entry a token."""

    def __init__(self, r):
        self.r, self.seen, self.held = r, 0, []

    def attend(self, queries, keys, values, scale):
        """Queries [g, q, D] of new tokens, one token after the other; what is let go afterwards."""
        new = [
            {"key": k, "value": v, "received": 0.0, "number": self.seen + i}
            for i, (k, v) in enumerate(zip(keys, values, strict=True))
        ]
        outputs = []
        for i in range(len(new)):
            visible = self.held + new[: i + 1]
            mixed = []
            for query in queries[:, i]:
                weights = torch.softmax(torch.stack([entry["key"] @ query for entry in visible]) * scale, 0)
                mixed.append(sum(w * entry["value"] for w, entry in zip(weights, visible, strict=True)))
                for weight, entry in zip(weights, visible, strict=True):
                    entry["received"] += float(weight)
            outputs.append(torch.stack(mixed))
        self.seen += len(new)
        self.held += new
        budget = max(1, math.floor(self.r * self.seen + 1e-6))
        if len(self.held) > budget:
            recent = (budget + 1) // 2
            by_age = sorted(self.held, key=lambda entry: -entry["number"])
            heavy = sorted(by_age[recent:], key=lambda entry: -entry["received"])
            self.held = by_age[:recent] + heavy[: budget - recent]
        return torch.stack(outputs, 1)  # [g, q, D]


def plain_h2o(sample, tokens, r, start_layer):
    """[T + 1, V] logits behind the prompt and each of `tokens`, and how many each layer holds in the end."""
    llm = MODEL._llm
    heads = [[PlainHead(r if index >= start_layer else 1) for _ in range(2)] for index in range(5)]
    position, logits = 0, []
    for ids in [sample.ids, *[token if isinstance(token, list) else [token] for token in tokens]]:
        ids = torch.tensor([ids])
        hidden = MODEL.get_input_embeddings()(ids)
        image = ids[0] == MODEL.config.image_token_id
        if image.any():
            hidden[0, image] = torch.cat(list(MODEL.model.get_image_features(sample.images).pooler_output))
        length = ids.shape[1]
        cos, sin = llm.rotary_emb(hidden, position_ids=torch.arange(position, position + length)[None])
        position += length
        for layer, layer_heads in zip(llm.layers, heads, strict=True):
            states = layer.input_layernorm(hidden)[0]
            attention = layer.self_attn
            query = attention.q_proj(states).view(length, 4, 8)
            key, value = (
                attention.k_proj(states).view(length, 2, 8),
                attention.v_proj(states).view(length, 2, 8),
            )
            mixed = []
            for group, head in enumerate(layer_heads):
                queries = torch.stack([turn(query[:, 2 * group + i], cos[0], sin[0]) for i in range(2)])
                mixed.append(
                    head.attend(queries, turn(key[:, group], cos[0], sin[0]), value[:, group], 8**-0.5)
                )
            hidden = hidden + attention.o_proj(torch.cat(mixed).transpose(0, 1).reshape(1, length, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(MODEL._logits(llm.norm(hidden))[0, -1])
    return torch.stack(logits), [len(layer_heads[0].held) for layer_heads in heads]


@pytest.mark.parametrize("r", [0.3, 0.75])
def test_h2o_lets_go_what_the_plain_version_lets_go(r):
    rng, samples = some_samples(11)
    steps = 8
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(steps)] for _ in samples])
    MODEL.set_sparsity(policy="h2o", r=r, start_layer=2)
    logits, cache = step_by_step(MODEL, batch_of(samples), answers)
    scored = MODEL.score(**batch_of(samples, labels=answers.tolist()))
    MODEL.set_sparsity(policy="full")
    full, _ = step_by_step(MODEL, batch_of(samples), answers)
    assert (full - logits).abs().max() > 1e-2, "letting go must matter here"
    for row, sample in enumerate(samples):
        with torch.no_grad():
            expected, held = plain_h2o(sample, answers[row, :-1].tolist(), r, 2)
        torch.testing.assert_close(logits[row], expected, **CLOSE)
        assert cache.kept_lengths()[:, row].tolist() == held
        chosen = expected.log_softmax(-1).gather(-1, answers[row][:, None])[:, 0]
        torch.testing.assert_close(scored[row][scored[row] != 0], chosen, **CLOSE)


def test_h2o_of_a_prompt_in_two_parts_and_labels_in_the_prompt():
    """A later prompt part is attended whole and then cut; earlier labels are scored as prompt text."""
    rng, samples = some_samples(12)
    sample, more = samples[1], [rng.randrange(3, 80) for _ in range(5)]
    MODEL.set_sparsity(policy="h2o", r=0.4)
    with torch.no_grad():
        first = MODEL(**batch_of([sample]))
        second = MODEL(torch.tensor([more]), past_key_values=first.past_key_values)
        plain, held = plain_h2o_in_parts(sample, more)
    torch.testing.assert_close(second.logits[0, -1], plain, **CLOSE)
    assert second.past_key_values.kept_lengths()[:, 0].tolist() == held
    batch = batch_of([sample], labels=[more])
    batch["labels"][0, 2:4] = batch["input_ids"][0, 2:4]
    whole = MODEL.score(**batch)
    MODEL.set_sparsity(policy="full")
    torch.testing.assert_close(whole[0, 2:4], MODEL.score(**batch)[0, 2:4], **CLOSE)


def plain_h2o_in_parts(sample, more):
    """As `plain_h2o` for a prompt and one further part of several tokens."""
    logits, held = plain_h2o(sample, [more], 0.4, 2)
    return logits[-1], held
