"""Labels: exactly the answers, on exactly the ids that inference sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import vicuna_v1, with_images
from dynllava_plugin.sparsity.selection import last_answer
from tests.property_tests import examples
from tests.training_kit import IMAGE_TOKENS, processor
from train.conversation import IGNORE, ConversationEncoder
from train.data import Collator, count_image_tokens
from train.samples import Sample

PROCESSORS = {
    "llama": processor(),
    "llama, chunks": processor(spacing="image"),
    "llama, legacy": processor(spacing="special"),
    "bytes": processor("bytes"),
}
TEXT = st.text(st.sampled_from("abcdefis redblue.,?!:USER\n\t 01é漢😀▁"), min_size=1, max_size=30).filter(
    str.strip
)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


def encoder(ready) -> ConversationEncoder:
    return ConversationEncoder(ready, ready.image_token_id, IMAGE_TOKENS)


def sample_of(turns, images: int = 1) -> Sample:
    (question, answer), *rest = turns
    return Sample("s", ("x.png",) * images, ((with_images(question, images), answer), *rest))


def runs(labels: list[int]) -> list[tuple[int, int]]:
    edges = [i for i in range(len(labels) + 1) if [*labels, IGNORE][i] != IGNORE]
    starts = [i for i in edges if i == 0 or labels[i - 1] == IGNORE]
    return [
        (i, next(j for j in range(i, len(labels) + 1) if j == len(labels) or labels[j] == IGNORE))
        for i in starts
    ]


@pytest.mark.parametrize("kind", PROCESSORS)
@examples(60)
@given(turns=TURNS, images=st.integers(1, 3))
def test_labels_are_the_answers_and_prompts_are_those_of_inference(kind, turns, images):
    ready = PROCESSORS[kind]
    sample = sample_of(turns, images)
    tokens = encoder(ready)(sample)
    found = runs(tokens.labels)
    assert len(found) == len(turns)
    pictures = [Image.new("RGB", (8, 8))] * images
    for index, (start, end) in enumerate(found):
        assert tokens.labels[start:end] == tokens.input_ids[start:end]
        assert tokens.input_ids[end - 1] == ready.tokenizer.eos_token_id
        until = ready.tokenizer.decode(tokens.input_ids[:start])
        answer = ready.tokenizer.decode(tokens.input_ids[:end])[len(until) :]
        expected = f" {turns[index][1]}</s>"
        if kind.startswith("llama"):  # which write a blank as "▁"
            answer, expected = answer.replace("▁", " "), expected.replace("▁", " ")
        assert answer == expected
        prompt = vicuna_v1([*sample.turns[:index], (sample.turns[index][0], None)])
        assert ready(images=pictures, text=[prompt])["input_ids"][0] == tokens.input_ids[:start]
    assert ready(images=pictures, text=[vicuna_v1(sample.turns)])["input_ids"][0] == tokens.input_ids
    assert tokens.input_ids.count(ready.image_token_id) == images * IMAGE_TOKENS


@examples(20)
@given(batch=st.lists(TURNS, min_size=1, max_size=3))
def test_last_answer_of_a_padded_batch_is_the_last_turn(batch):
    ready = PROCESSORS["llama"]
    encoded = [encoder(ready)(sample_of(turns)) for turns in batch]
    pixels = ready.image_processor([Image.new("RGB", (32, 32))], return_tensors="pt")["pixel_values"]
    collate = Collator(ready.tokenizer.pad_token_id, encoder(ready).stand_in())
    rows = [
        {"input_ids": t.input_ids, "labels": t.labels, "images": {"pixel_values": pixels}, "sample": 0}
        for t in encoded
    ]
    padded = collate(rows)
    masks = last_answer(padded["labels"])
    for row, tokens in enumerate(encoded):
        start, end = runs(tokens.labels)[-1]
        assert masks[row].nonzero()[:, 0].tolist() == list(range(start, end))
        assert padded["attention_mask"][row].sum() == len(tokens.input_ids)
        assert padded["input_ids"][row, : len(tokens.input_ids)].tolist() == tokens.input_ids


def test_image_tokens_are_those_of_the_processor():
    ready = PROCESSORS["llama"]
    assert count_image_tokens(ready, ready.image_token_id) == IMAGE_TOKENS


def test_a_tokenizer_with_another_end_of_sequence_is_refused():
    ready = processor()
    ready.tokenizer.eos_token = "<s>"
    with pytest.raises(UserError, match="end of sequence"):
        encoder(ready)
