"""The tiny stock checkpoints of every family load, and the masking oracle does what its description says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.families.checkpoints import (
    FAMILIES,
    image_places,
    sample_batch,
    sample_of,
    stock_model,
    stock_processor,
    write_checkpoint,
)
from tests.families.oracle import (
    attention_at,
    decoder,
    hidden_at,
    last_row_attention,
    oracle_logits,
    oracle_tokens,
    visible,
    with_tokens,
)

SIZES = [[(56, 84)], [(28, 28), (84, 42)], []]
QUESTIONS = ["What color is the shape?", "Is there a red circle?", "Yes or no?"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def one(family: str, index: int = 0) -> dict:
    return sample_of(family, stock_processor(family), SIZES, QUESTIONS, index)


@every_family
def test_a_folder_loads_as_its_stock_classes(family: str, tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path)
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(model).__name__ == FAMILIES[family].model_class
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(processor) is type(stock_processor(family))
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    loaded, made = (sample_batch(family, p, SIZES, QUESTIONS) for p in (processor, stock_processor(family)))
    assert loaded.keys() == made.keys()
    assert all(torch.equal(loaded[key], made[key]) for key in made)
    with torch.no_grad():
        assert torch.equal(model(**loaded).logits, stock_model(family)(**made).logits)


@every_family
@pytest.mark.parametrize("index", range(len(SIZES)))
@torch.no_grad()
def test_a_batch_is_its_samples(family: str, index: int) -> None:
    model, alone = stock_model(family), one(family, index)
    batch = sample_batch(family, stock_processor(family), SIZES, QUESTIONS)
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][index, -length:], alone["input_ids"][0])
    assert batch["attention_mask"][index].sum() == length
    torch.testing.assert_close(
        model(**batch).logits[index, -length:], model(**alone).logits[0], atol=5e-5, rtol=0
    )


@every_family
@torch.no_grad()
def test_keeping_everything_is_the_stock_model(family: str) -> None:
    inputs = one(family, 1)
    length = inputs["input_ids"].shape[1]
    eager, model = stock_model(family, attention="eager"), stock_model(family)
    found = oracle_logits(model, inputs, 2, torch.ones(length, dtype=torch.bool))
    torch.testing.assert_close(found, eager(**inputs).logits[0], atol=1e-6, rtol=0)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, model(**inputs).logits[0], atol=5e-5, rtol=0)


@every_family
def test_a_dropped_column_changes_what_follows_it_and_nothing_before(family: str) -> None:
    model, inputs = stock_model(family), one(family)
    length = inputs["input_ids"].shape[1]
    full = oracle_logits(model, inputs)
    column = int(image_places(family, stock_processor(family), SIZES[0], inputs)[0][2])
    keep = torch.arange(length) != column
    for gate in (0, 2):
        found = oracle_logits(model, inputs, gate, keep)
        # The dropped token itself still sees what it saw.
        torch.testing.assert_close(found[: column + 1], full[: column + 1], atol=1e-6, rtol=0)
        assert (found[column + 1 :] - full[column + 1 :]).abs().amax(-1).min() > 1e-3


@every_family
def test_several_gates_drop_one_after_the_other(family: str) -> None:
    model, inputs = stock_model(family), one(family)
    length = inputs["input_ids"].shape[1]
    places = image_places(family, stock_processor(family), SIZES[0], inputs)[0]
    early, late, both = (torch.ones(length, dtype=torch.bool) for _ in range(3))
    early[places[0]] = late[places[1]] = both[places[:2]] = False
    two = oracle_logits(model, inputs, keeps={1: early, 3: late})
    # The second gate is one that drops both, since the first one's stay dropped.
    torch.testing.assert_close(two, oracle_logits(model, inputs, keeps={1: early, 3: both}), atol=0, rtol=0)
    assert (two - oracle_logits(model, inputs, 1, early))[-1].abs().max() > 1e-3
    assert (two - oracle_logits(model, inputs, 1, both))[-1].abs().max() > 1e-3


@every_family
def test_hidden_states_and_attention_are_the_models(family: str) -> None:
    model, inputs = stock_model(family, attention="eager"), one(family, 1)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    for layer in range(4):
        torch.testing.assert_close(attention_at(model, inputs, layer), out.attentions[layer][0])
    rows = last_row_attention(model, inputs, 1)
    torch.testing.assert_close(rows.sum(-1), torch.ones(4))
    # Far from uniform, so that ranks are no ties.
    assert rows.max() > 3 / rows.shape[1]
    last = decoder(model).norm(hidden_at(model, inputs, 4))
    torch.testing.assert_close(model.get_output_embeddings()(last), out.logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden_at(model, inputs, 0), out.hidden_states[0][0])


@every_family
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    model, inputs = stock_model(family), one(family)
    model.generation_config.eos_token_id = None
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert oracle_tokens(model, inputs, {}, 5) == found.tolist()
    longer = with_tokens(inputs, found[:4].tolist())
    assert int(oracle_logits(model, longer)[-1].argmax()) == found[4]


@every_family
def test_images_have_their_own_places(family: str) -> None:
    inputs, processor = one(family, 1), stock_processor(family)
    places = image_places(family, processor, SIZES[1], inputs)
    assert len(places) == 2 and all(len(of) >= 4 for of in places)
    assert int(places[0].max()) < int(places[1].min())
    assert len(torch.cat(places)) == (inputs["input_ids"] == processor.image_token_id).sum()


def test_what_a_row_sees() -> None:
    keep = torch.tensor([True, False, True])
    assert visible(3, 1, {2: keep}).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert visible(3, 2, {2: keep}).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, False, True],
    ]


def test_the_oracle_refuses_padding() -> None:
    batch = sample_batch("llava_llama", stock_processor("llava_llama"), SIZES, QUESTIONS)
    with pytest.raises(AssertionError, match="one sample without padding"):
        oracle_logits(stock_model("llava_llama"), batch)
