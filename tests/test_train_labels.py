"""Labels: exactly the answers, on exactly the ids that inference sees."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.llava_json import Sample
from dynllava_plugin.model.prompts import vicuna_v1, with_images
from dynllava_plugin.sparsity.selection import last_answer
from tests.property_tests import examples
from tests.training_kit import IMAGE_TOKENS, conversation, processor
from train.conversation import IGNORE, ConversationEncoder
from train.data import Collator, count_image_tokens

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


def llava_learns(turns: list[tuple[str, str]]) -> bool:
    """LLaVA's rule in words: cut at `</s>`; each round, up to an empty one, has one " ASSISTANT: " in it; nothing is left over."""
    text, learned = vicuna_v1(turns), 0
    for part in text.split("</s>"):
        if not part or len(part.split(" ASSISTANT: ")) != 2:
            break
        learned += len(part) + len("</s>")
    return learned == len(text)


ODD = st.text(st.sampled_from("ab "), max_size=4)
MARKED = st.lists(
    ODD | st.sampled_from(["</s>", "ASSISTANT: ", "ASSISTANT:", "USER: ", "<pad>"]), min_size=1, max_size=3
)
PART = MARKED.map("".join).filter(str.strip)


@examples(150)
@given(turns=st.lists(st.tuples(PART, PART), min_size=1, max_size=3))
def test_a_turn_that_ends_or_begins_an_answer_teaches_nothing(turns):
    sample = sample_of(turns)
    tokens = encoder(PROCESSORS["llama"])(sample)
    assert any(label != IGNORE for label in tokens.labels) == llava_learns(list(sample.turns))


@pytest.mark.parametrize("kind", ["llama", "bytes"])
def test_a_literal_pad_is_text(kind):
    ready = PROCESSORS[kind]
    sample = sample_of([("what is a <pad>", "a <pad> is <pad>")])
    tokens = encoder(ready)(sample)
    pad = ready.tokenizer.pad_token_id
    assert pad not in tokens.input_ids
    assert ready.tokenizer.decode(tokens.input_ids).replace("▁", " ").count("<pad>") == 3
    assert ready.tokenizer("<pad>", add_special_tokens=False)["input_ids"] == [pad]  # as before


def test_a_sample_that_teaches_nothing_is_named(tmp_path):
    from tests.test_train_data import dataset_of
    from train.mixture import open_mixture

    rows = [{"image": "0.png", "conversations": conversation(("<image>\nwhat", "a</s> b"))}]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    dataset = dataset_of(
        open_mixture(tmp_path / "mix.json", tmp_path / "c")[0], tmp_path, tmp_path, PROCESSORS["llama"]
    )
    assert set(dataset[0]["labels"]) == {IGNORE}
    assert dataset.skipped.counts() == {"not labelled": 1} and not dataset.skipped.too_many()
