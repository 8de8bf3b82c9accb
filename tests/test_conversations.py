"""Conversations: earlier answers stay sparsified; one parallel pass equals a cache carried through all rounds."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.engine.prompting import VICUNA
from dynllava_plugin.evaluation.engine.requests import Generation
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.flops import CachedDecoder, DecoderShape, OutputCost, output_cost
from tests.property_tests import examples
from tests.tiny_random import EOS, PAD, batch_of, random_model, random_sample

CLOSE = dict(rtol=1e-4, atol=1e-4)
MODEL = random_model(seed=3)
ROUNDS = st.lists(st.tuples(st.integers(2, 6), st.integers(1, 9)), min_size=1, max_size=4)


def feed(ids, mask, cache, output):
    """Tokens behind a cache: output text one by one, prompt text in one piece. Returns logits of each [n, V]."""
    logits = []
    for piece in ids.split(1, dim=1) if output else (ids,):
        mask = torch.cat([mask, mask.new_ones(1, piece.shape[1])], 1)
        seen = cache.get_seq_length()
        length = None if output else seen + piece.shape[1]
        with torch.no_grad():
            out = MODEL(piece, attention_mask=mask, past_key_values=cache, prompt_length=length)
        logits.append(out.logits[0])
    return torch.cat(logits), mask


@examples(20)
@given(seed=st.integers(0, 2**20), rounds=ROUNDS)
def test_one_pass_scores_a_conversation_as_the_cache_does(seed, rounds):
    rng = random.Random(seed)
    first = random_sample(rng, rng.randrange(3), rng.randrange(1, 6))
    batch = batch_of([first])
    with torch.no_grad():
        out = MODEL(**batch, use_cache=True)
    cache, mask = out.past_key_values, batch["attention_mask"]
    last, expected, kept = out.logits[0, -1:], [], []
    whole, output = list(first.ids), [False] * len(first.ids)
    for number, (asked, answered) in enumerate(rounds):
        if number:
            question = torch.tensor([[rng.randrange(3, 80) for _ in range(asked)]])
            logits, mask = feed(question, mask, cache, output=False)
            last = logits[-1:]
            whole += question[0].tolist()
            output += [False] * asked
        answer = torch.tensor([[rng.randrange(3, 80) for _ in range(answered)]])
        before = len(cache.output_keep()[0]) if cache.output_keep() is not None else 0
        logits, mask = feed(answer, mask, cache, output=True)
        ahead = torch.cat([last, logits[:-1]])
        expected.append(ahead.log_softmax(-1).gather(-1, answer[0][:, None])[:, 0])
        kept.append(cache.output_keep()[0, before:])
        whole += answer[0].tolist()
        output += [True] * answered
    output_mask = torch.tensor([output])
    ids = torch.tensor([whole])
    found = MODEL.score_details(
        ids,
        pixel_values=batch.get("pixel_values"),
        labels=ids.masked_fill(~output_mask, -100),
        output_mask=output_mask,
    )
    torch.testing.assert_close(found.log_probs[output_mask], torch.cat(expected), **CLOSE)
    assert torch.equal(found.text_keep[output_mask], torch.cat(kept))


@examples(10)
@given(seed=st.integers(0, 2**20), use_cache=st.booleans())
def test_generation_behind_earlier_answers_equals_the_carried_cache(seed, use_cache):
    """A batch of two conversations, against each one's own cache carried on by hand."""
    rng, steps = random.Random(seed), 5
    samples = [random_sample(rng, rng.randrange(3), rng.randrange(1, 6)) for _ in range(2)]
    prompts, masks, wanted, lengths = [], [], [], []
    for sample in samples:
        batch = batch_of([sample])
        with torch.no_grad():
            out = MODEL(**batch, use_cache=True)
        cache, mask = out.past_key_values, batch["attention_mask"]
        answer = torch.tensor([[rng.randrange(3, 80) for _ in range(rng.randrange(1, 9))]])
        question = torch.tensor([[rng.randrange(3, 80) for _ in range(rng.randrange(2, 6))]])
        _, mask = feed(answer, mask, cache, output=True)
        logits, mask = feed(question, mask, cache, output=False)
        lengths.append(cache.kept_lengths()[:, 0])
        tokens = []
        for _ in range(steps):
            tokens.append(int(logits[-1].argmax()))
            logits, mask = feed(torch.tensor([tokens[-1:]]), mask, cache, output=True)
        wanted.append(tokens)
        prompts.append(sample.ids + answer[0].tolist() + question[0].tolist())
        masks.append([False] * len(sample.ids) + [True] * answer.shape[1] + [False] * question.shape[1])
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in prompts])
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    earlier = torch.tensor([[False] * (width - len(row)) + row for row in masks])
    images = torch.cat([sample.images for sample in samples])
    inputs = {"input_ids": ids, "attention_mask": attention, "output_mask": earlier}
    inputs |= {"pixel_values": images} if len(images) else {}
    generated = MODEL.generate(
        **inputs, do_sample=False, min_new_tokens=steps, max_new_tokens=steps, use_cache=use_cache,
        return_dict_in_generate=True, suppress_tokens=[EOS],
    )  # fmt: skip
    for row, tokens in enumerate(wanted):
        if EOS not in tokens:  # which generate() was told to avoid
            assert generated.sequences[row, width:].tolist() == tokens
    with torch.no_grad():
        prefill = MODEL(**inputs, use_cache=True).past_key_values.kept_lengths()
    assert torch.equal(prefill, torch.stack(lengths, 1))


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    return Engine.load(ModelSettings("tiny", device="cpu", mode="image_text"), batch_size=4)


TALK = [
    ("What is it?", "it is a red circle in the image."),
    ("Where?", "In the top left."),
    ("Is it red?", "yes"),
]


def test_spans_are_the_answers() -> None:
    request = VICUNA.request([*TALK[:2], (TALK[2][0], None)], ["a.png"], "talk", "yes")
    assert [request.prompt[s:e] for s, e in request.output_spans] == [f" {answer}" for _, answer in TALK[:2]]
    assert request.prompt == VICUNA.prompt([*TALK[:2], (TALK[2][0], None)], 1, "talk")
    assert request.continuation == " yes"
    assert VICUNA.request([("A", ""), ("A chat", None)], [], "talk").output_spans == ()


def test_rounds_of_a_score(engine: Engine) -> None:
    """A first round in a conversation scores as it does alone; the totals are the rounds'."""
    whole = VICUNA.request([*TALK[:2], (TALK[2][0], None)], [], "talk", TALK[2][1])
    alone = VICUNA.request([(TALK[0][0], None)], [], "talk", TALK[0][1])
    together, single = engine.score([whole, alone])
    assert len(together.rounds) == 3 and single.rounds == ()
    assert together.rounds[0].logprob == pytest.approx(single.logprob, abs=1e-3)
    assert together.rounds[0].kept_tokens == single.kept_tokens and together.rounds[0].cost == single.cost
    assert together.tokens == sum(part.tokens for part in together.rounds)
    assert together.perplexity == pytest.approx(sum(part.perplexity for part in together.rounds) / 3)
    assert together.cost == together.rounds[0].cost + together.rounds[1].cost + together.rounds[2].cost


def test_counts_of_an_answer_behind_earlier_ones(engine: Engine) -> None:
    """What the earlier answers lose isn't mistaken for image tokens or for the new answer's."""
    from PIL import Image

    image = Image.effect_noise((64, 64), 90)
    request = VICUNA.request([*TALK[:2], (TALK[2][0], None)], [image], "talk")
    plain = VICUNA.request([(TALK[0][0], None)], [image], "talk")
    answer, other = engine.generate([request, plain], Generation.from_task({"max_new_tokens": 9}))
    assert answer.image_tokens == other.image_tokens > 0
    assert answer.kept_image_tokens == other.kept_image_tokens == int(0.2 * answer.image_tokens)
    assert answer.cached_tokens == answer.generated_tokens - 1 >= answer.kept_tokens >= 0
    assert engine.encoder.features.computed == 1  # one image, two questions


DECODER = CachedDecoder(DecoderShape(5, 32, 64, 4, 2, 100), sparse_layer=2, itemsize=4)


@given(
    dense=st.integers(0, 50),
    dropped=st.integers(0, 50),
    keep=st.lists(st.booleans(), min_size=0, max_size=20),
)
def test_costs_counted_layer_by_layer(dense: int, dropped: int, keep: list[bool]) -> None:
    """Once more by brute force: a loop over tokens and layers that holds lists."""
    dense += dropped
    per_layer = [[None] * dense for _ in range(2)] + [[None] * (dense - dropped) for _ in range(3)]
    start = sum(map(len, per_layer))
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    flops = kept = 0
    for stays in keep:
        for layer, held in enumerate(per_layer):
            here = linear + 2 * 2 * 32 * (len(held) + 1)
            flops += here
            if stays or layer < 2:
                held.append(None)
                kept += here
        flops += 2 * 32 * 100
        kept += 2 * 32 * 100 if stays else 0
    grown = sum(map(len, per_layer)) - start
    expected = OutputCost(grown * 2 * 2 * 8 * 4, flops, kept)
    assert output_cost(DECODER, dense, dense - dropped, keep) == expected


def test_full_context_costs_what_the_paper_says() -> None:
    """7B: 103 MiB and 2.75 TFLOPs for 206 output tokens (Table 3, LLaVA-1.5, LVIS-VQA single)."""
    llama = CachedDecoder(DecoderShape(32, 4096, 11008, 32, 32, 32000), sparse_layer=2, itemsize=2)
    cost = output_cost(llama, 640, 640, [True] * 206)
    assert cost.kv_bytes / 2**20 == pytest.approx(103)
    assert cost.flops == cost.flops_kept == pytest.approx(2.75e12, rel=0.03)
