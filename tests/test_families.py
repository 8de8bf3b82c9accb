"""Families x policies: the stock class in full context, and the same thing computed in several ways, against a masking oracle."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies import POLICIES
from dynllava_plugin.policies.base import CLASS_TOKEN, SQUARE, Choice, Gate, ImagePolicy, top_tokens
from tests.families.checkpoints import EVERY, FAMILIES, image_places, sample_batch, sample_of, stock_processor
from tests.families.oracle import hidden_at, last_row_attention, oracle_logits, with_tokens
from tests.families.ours import answers_of, model_of, stock_of
from tests.property_tests import examples

CLOSE = dict(rtol=1e-4, atol=2e-4)
SIZES = [[(56, 84)], [(28, 28), (84, 42)], []]
QUESTIONS = ["What color is the shape?", "Is there a red circle here, or two of them?", "Yes or no?"]
every_family = pytest.mark.parametrize("family", EVERY)


@dataclass(frozen=True, kw_only=True)
class TwoGates(ImagePolicy):
    """A policy with a gate at layers 1 and 3: half of what is there, by the size of its state."""

    name = "two_gates"
    rule = "half at 1, half of those at 3"
    source = "this test"
    reads_question = False

    @property
    def layers(self) -> tuple[int, ...]:
        return (1, 3)

    def keep_image(self, gate: Gate) -> Choice:
        score = gate.of_images(gate.hidden.float().norm(dim=-1))
        return top_tokens(score, max(1, score.shape[1] // 2))


@pytest.fixture(autouse=True)
def two_gates(monkeypatch):
    monkeypatch.setitem(POLICIES, "two_gates", TwoGates)


# Settings, and the gates' layers that the oracle masks at.
SETTINGS = [
    "image,keep=0.4",
    "image_text,keep=0.4",
    "fastv,k=2,keep=0.3",
    "random,keep=0.5",
    "image+structure,keep=0.4,layer=1",
    "divprune,keep=0.4,positions=original",
    "cdpruner+structure,cdpruner.keep=0.4",  # the second gate has fewer columns before the output text
    "two_gates",
    "h2o,r=0.5",
    "pyramiddrop,ratio=0.6",
    "dart,keep=0.4",
    "snapkv,r=0.5,window=6,kernel=3",
    "sparsevlm,ratio=0.6",
    "v2drop,ratio=0.6",
    "pyramidkv,r=0.5,window=6,kernel=3",
    "schedule,0:divprune:0.6,2:image:0.3",
    "image,threshold=0.5",
]
# Families that have some; InternVL's processor makes tiles of frames, images to the model.
VIDEOS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision", "llava_next_video"}
TILED_VIDEOS = {"internvl", "internvl_qwen3"}
_sides = st.sampled_from([28, 42, 56, 84]), st.sampled_from([28, 56, 70])
drawn_shapes = st.tuples(  # images, and every third a video of so many frames
    st.integers(0, 2**16),
    st.lists(
        st.lists(
            st.one_of(st.tuples(*_sides), st.tuples(*_sides), st.tuples(*_sides, st.sampled_from([2, 4, 6]))),
            max_size=2,
        ),
        min_size=1,
        max_size=3,
    ),
)


def batch_for(family: str, sizes: Any, seed: int = 0) -> tuple[dict, list[dict], list[str]]:
    """A batch, its samples alone, and their questions; a video is an image in a family without."""
    if family not in VIDEOS | TILED_VIDEOS:
        sizes = [[size[:2] for size in of] for of in sizes]
    elif not family.startswith("qwen"):  # its processor stacks videos: of one number of frames
        sizes = [[(*size[:2], 4) if len(size) == 3 else size for size in of] for of in sizes]
    processor = stock_processor(family)
    questions = [QUESTIONS[(seed + i) % 3] + " Look again." * ((seed + i) % 2) for i in range(len(sizes))]
    batch = sample_batch(family, processor, sizes, questions, seed)
    alone = [sample_of(family, processor, sizes, questions, i, seed) for i in range(len(sizes))]
    return batch, alone, questions


@torch.no_grad()
def step_by_step(
    model: Any, batch: dict, answers: torch.Tensor, cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """[B, T, V] logits before each answer token, fed one by one behind the cache; and the cache."""
    out = model(**batch, use_cache=True, past_key_values=cache, logits_to_keep=1)
    mask, logits = batch["attention_mask"], [out.logits[:, -1]]
    for column in range(answers.shape[1] - 1):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(
            answers[:, column : column + 1], attention_mask=mask, past_key_values=out.past_key_values, logits_to_keep=1
        )  # fmt: skip
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), out.past_key_values


@torch.no_grad()
def uncached(model: Any, sample: dict, answer: torch.Tensor) -> Any:
    longer = with_tokens(sample, answer.tolist())
    return model(**longer, use_cache=False, prompt_length=sample["input_ids"].shape[1], logits_to_keep=1)


@every_family
def test_full_context_is_the_stock_class(family):
    assert_full_context_is_the_stock_class(family, SIZES)


@torch.no_grad()
def assert_full_context_is_the_stock_class(family, sizes):
    """Logits of a left-padded batch and alone, greedy tokens with and without cache, static, beams."""
    model, stock = model_of(family), stock_of(family)
    model.set_sparsity(mode="full")
    batch, alone, _ = batch_for(family, sizes)
    real = batch["attention_mask"].bool()
    found, expected = model(**batch).logits, stock(**batch).logits
    torch.testing.assert_close(found[real], expected[real], **CLOSE)
    for sample in alone:
        torch.testing.assert_close(model(**sample).logits, stock(**sample).logits, rtol=1e-5, atol=1e-5)
    options = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6)
    expected = stock.generate(**batch, **options)
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**batch, **options, **more), expected), more
    beams = stock.generate(**batch, **options, num_beams=3)
    assert torch.equal(model.generate(**batch, **options, num_beams=3), beams)


@pytest.mark.parametrize("family", FAMILIES)  # their relatives: drawn in `test_matrix`
@pytest.mark.parametrize("text", SETTINGS)
@examples(2)
@given(shapes=drawn_shapes)
def test_batch_single_cached_uncached_and_scored_agree(family, text, shapes):
    seed, sizes = shapes
    model = model_of(family)
    model.set_sparsity(policy=text)
    sequential = model._llm.policy.sequential
    steps = 5
    batch, alone, _ = batch_for(family, sizes, seed)
    answers = answers_of(family, len(sizes), steps, seed)
    together, cache = step_by_step(model, batch, answers)
    static = None if sequential else step_by_step(model, batch, answers, model.new_cache("static"))[0]
    if static is not None:
        torch.testing.assert_close(static, together, **CLOSE)
    for row, sample in enumerate(alone):
        own, own_cache = step_by_step(model, sample, answers[row : row + 1])
        torch.testing.assert_close(together[row], own[0], **CLOSE)
        assert torch.equal(cache.kept_lengths()[:, row], own_cache.kept_lengths()[:, 0])
        assert torch.equal(cache.output_keep()[row], own_cache.output_keep()[0])
        longer = with_tokens(sample, answers[row].tolist())
        labels = torch.full_like(longer["input_ids"], -100)
        labels[:, -steps:] = answers[row]
        scores = model.score(**longer, labels=labels)[0, -steps:]
        expected = own[0].log_softmax(-1).gather(-1, answers[row][:, None])[:, 0]
        torch.testing.assert_close(scores, expected, **CLOSE)
        if not sequential:
            for step in (0, steps - 1):
                out = uncached(model, sample, answers[row, :step])
                torch.testing.assert_close(out.logits[0, -1], own[0, step], **CLOSE)


@every_family
@pytest.mark.parametrize(
    "text", ["image_text,keep=0.4", "fastv,k=2,keep=0.3", "divprune,keep=0.4,positions=original"]
)
def test_cached_decoding_is_what_the_masking_oracle_says(family, text):
    assert_as_the_oracle_says(family, text)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_that_turn_keep_their_positions_before_the_llm(family):
    """What is packed elsewhere would put a question before its image here: an image of N tokens counts for its longer side."""
    assert_as_the_oracle_says(family, "divprune,keep=0.2,positions=packed")


@torch.no_grad()
def assert_as_the_oracle_says(family, text):
    """Decisions as the model tells them, logits as a stock model with masks gives them, one sample, no cache."""
    model, stock = model_of(family), stock_of(family)
    model.set_sparsity(policy=text)
    policy = model._llm.policy
    batch, alone, _ = batch_for(family, SIZES)
    steps = 5
    answers = answers_of(family, len(SIZES), steps, 3)
    together, cache = step_by_step(model, batch, answers)
    decided = model(**batch, logits_to_keep=1)
    for row, sample in enumerate(alone):
        prompt = sample["input_ids"].shape[1]
        longer = with_tokens(sample, answers[row, :-1].tolist())
        keep = torch.ones(prompt + steps - 1, dtype=torch.bool)
        places = sample["input_ids"][0] == model.config.image_token_id
        if decided.image_keep is not None and places.any():
            keep[:prompt][places] = decided.image_keep[row, : int(places.sum())]
        keep[prompt:] = cache.output_keep()[row]
        expected = oracle_logits(stock, longer, policy.layers[0], keep)[prompt - 1 :]
        torch.testing.assert_close(together[row], expected, **CLOSE)


def units(model: Any, family: str, sizes: Any, sample: dict) -> list[torch.Tensor]:
    """Places of what counts as an image: InternVL's tiles each by itself."""
    places = image_places(family, stock_processor(family), sizes, sample)
    if family in TILED_VIDEOS:
        return [tile for image in places for tile in image.split(model.config.image_seq_length)]
    return places


@every_family
@torch.no_grad()
def test_the_predictor_and_fastv_decide_as_computed_from_the_stock_model(family):
    """floor(r * N) of each image, at least one, ranked by the predictor on the stock model's states, one image at a time."""
    model, stock = model_of(family), stock_of(family)
    batch, alone, _ = batch_for(family, SIZES)
    model.set_sparsity(policy="image,keep=0.4")
    learned = model(**batch, logits_to_keep=1).image_keep
    model.set_sparsity(policy="fastv,k=2,keep=0.3")
    fastv = model(**batch, logits_to_keep=1).image_keep
    predictor = model._llm.image_predictor
    for row, (sizes, sample) in enumerate(zip(SIZES, alone, strict=True)):
        hidden = hidden_at(stock, sample, 2)
        rows = last_row_attention(stock, sample, 1).mean(0)
        start = 0
        for places in units(model, family, sizes, sample):
            logits = predictor(hidden[places][None])[0]
            score, count = logits[:, 0] - logits[:, 1], len(places)
            for found, ranked, rate in ((learned, score, 0.4), (fastv, rows[places], 0.3)):
                expected = sorted(
                    ranked.argsort(descending=True)[: max(1, math.floor(rate * count))].tolist()
                )
                assert found[row, start : start + count].nonzero()[:, 0].tolist() == expected
            start += count
        assert not learned[row, start:].any()


@every_family
@torch.no_grad()
def test_two_gates(family):
    """The second gate sees what the first left; a token dropped at the first is in no later layer's cache."""
    model, stock = model_of(family), stock_of(family)
    model.set_sparsity(policy="two_gates")
    sample = batch_for(family, SIZES)[1][1]
    answers = answers_of(family, 1, 4, 1)
    logits, cache = step_by_step(model, sample, answers)
    length = sample["input_ids"].shape[1]
    first, second = torch.ones(length, dtype=torch.bool), torch.ones(length, dtype=torch.bool)
    images = units(model, family, SIZES[1], sample)
    size = hidden_at(stock, sample, 1).norm(dim=-1)
    kept = []
    for places in images:
        stay = places[size[places].topk(max(1, len(places) // 2)).indices.sort().values]
        first[places] = False
        first[stay] = True
        kept.append(stay)
    size = hidden_at(stock, sample, 3, {1: first}).norm(dim=-1)
    second[:] = first
    for stay in kept:
        second[stay] = False
        second[stay[size[stay].topk(max(1, len(stay) // 2)).indices]] = True
    more = torch.ones(3, dtype=torch.bool)
    keeps = {1: torch.cat([first, more]), 3: torch.cat([second, more])}
    longer = with_tokens(sample, answers[0, :-1].tolist())
    expected = oracle_logits(stock, longer, keeps=keeps)[length - 1 :]
    torch.testing.assert_close(logits[0], expected, **CLOSE)
    held = cache.kept_lengths()[:, 0].tolist()
    assert held == [length + 3, *[int(first.sum()) + 3] * 2, int(second.sum()) + 3]
    places = torch.cat(images)
    assert torch.equal(model(**sample).image_keep[0], second[places])


@pytest.mark.parametrize(
    ("family", "text"),
    [("llava_llama", "divprune,keep=0.4"), ("qwen2_5_vl", "image_text,keep=0.4"), ("qwen3_vl", "h2o,r=0.5")],
)
@torch.no_grad()
def test_rows_picked_from_a_cache_go_on_as_alone(family, text):
    """Each with its own positions: text moved up by what its image lost, or behind an image that turned."""
    model = model_of(family)
    model.set_sparsity(policy=text)
    batch, alone, _ = batch_for(family, SIZES)
    answers, rows = answers_of(family, len(SIZES), 3, 6), [1, 0]
    out = model(**batch, use_cache=True)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
    width = mask.shape[1] - 1
    out = model(answers[:, :1], attention_mask=mask[:, :width], past_key_values=out.past_key_values)
    cache = out.past_key_values
    cache.batch_select_indices(torch.tensor(rows))
    out = model(answers[rows, 1:2], attention_mask=mask[rows], past_key_values=cache)
    for place, row in enumerate(rows):
        own, own_cache = step_by_step(model, alone[row], answers[row : row + 1])
        torch.testing.assert_close(out.logits[place, -1], own[0, 2], **CLOSE)
        if (kept := own_cache.output_keep()) is not None:
            assert torch.equal(cache.output_keep()[place], kept[0])


@every_family
@torch.no_grad()
def test_generate_in_all_its_forms(family):
    model = model_of(family)
    model.set_sparsity(policy="image_text,keep=0.4")
    batch, alone, _ = batch_for(family, SIZES)
    options = dict(max_new_tokens=5, min_new_tokens=5)
    greedy = model.generate(**batch, do_sample=False, **options)
    assert torch.equal(greedy, model.generate(**batch, do_sample=False, use_cache=False, **options))
    assert torch.equal(
        greedy, model.generate(**batch, do_sample=False, cache_implementation="static", **options)
    )
    width = batch["input_ids"].shape[1]
    for row, sample in enumerate(alone):
        own = model.generate(**sample, do_sample=False, **options)
        assert torch.equal(own[0, -5:], greedy[row, width:])
    torch.manual_seed(0)
    several = model.generate(**batch, do_sample=True, num_return_sequences=2, **options)
    assert several.shape[0] == 2 * len(SIZES)
    beams = model.generate(**batch, do_sample=False, num_beams=2, **options)
    assert torch.equal(
        beams[1, -5:], model.generate(**alone[1], do_sample=False, num_beams=2, **options)[0, -5:]
    )


@every_family
@torch.no_grad()
def test_right_padding_and_eager_attention(family):
    model = model_of(family)
    _, alone, _ = batch_for(family, SIZES)
    for text in ("full", "image_text,keep=0.4"):
        model.set_sparsity(policy=text)
        sample = alone[0]
        right = {**sample}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in sample:
                right[name] = torch.nn.functional.pad(sample[name], (0, 3))
        expected = model(**sample, logits_to_keep=1).logits[:, -1]
        torch.testing.assert_close(model(**right, logits_to_keep=1).logits[:, -1], expected, **CLOSE)
        options = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)
        answer = model.generate(**sample, **options)[0, -4:]
        for more in ({}, {"use_cache": False}):
            assert torch.equal(model.generate(**right, **options, **more)[0, -4:], answer), more
        eager = model_of(family, "eager")
        eager.set_sparsity(policy=text)
        torch.testing.assert_close(eager(**sample, logits_to_keep=1).logits[:, -1], expected, **CLOSE)


@every_family
def test_what_a_family_cannot_do_is_one_line(family):
    model = model_of(family)
    model.set_sparsity(mode="image_text")
    batch, _, _ = batch_for(family, SIZES)
    ids = batch["input_ids"]
    with pytest.raises(UserError, match=r"image tokens for no image \(pixel_values\) or video"):
        model(ids, attention_mask=batch["attention_mask"])
    if family not in VIDEOS:
        for call in (model, model.generate):
            with pytest.raises(UserError, match="pixel_values_videos: this family has no videos"):
                call(**batch, pixel_values_videos=torch.zeros(1))
    with pytest.raises(UserError, match="output_attentions: layers hold different tokens"):
        model(**batch, output_attentions=True)
    with pytest.raises(
        UserError, match="past_key_values: DynamicCache can't hold a different context per layer"
    ):
        model.generate(**batch, past_key_values=DynamicCache(), max_new_tokens=1)
    fewer = {**batch, "input_ids": ids.clone()}
    places = (ids == model.config.image_token_id).nonzero()
    fewer["input_ids"][places[0][0], places[0][1]] = ids[0, -1]
    with pytest.raises(UserError, match="image tokens"):
        model(**fewer)
    with pytest.raises(UserError, match=r"layer 4 is outside the model, which has layers 0\.\.3"):
        model.set_sparsity(policy="fastv,k=4")
    for text, need in (
        ("visionzip", CLASS_TOKEN),
        ("downsample", SQUARE),
        ("schedule,0:downsample:0.5", SQUARE),
    ):
        if need not in model.gives:
            with pytest.raises(UserError, match=f"^policy: {text.partition(',')[0]} needs {need}, which "):
                model.set_sparsity(policy=text)


PAGE = Path(__file__).resolve().parents[1] / "docs" / "policies.md"
CLIP = {"llava_llama", "llava_mistral"}  # llava_qwen2's tower is a SigLIP
WHERE = {"all": {*EVERY}, "LLaVA-1.5": CLIP, "LLaVA-1.5, InternVL": {*CLIP, "llava_qwen2", *TILED_VIDEOS}}


def documented() -> dict[str, tuple[str, str]]:
    """The page's table: families and source of each policy."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in PAGE.read_text().splitlines()
    ]
    return {row[0].strip("`"): (row[4], row[6]) for row in rows if len(row) == 7 and row[0].startswith("`")}


@every_family
@torch.no_grad()
def test_every_policy_runs_on_the_families_that_the_page_names(family):
    model = model_of(family)
    batch, alone, _ = batch_for(family, SIZES)
    page = documented()
    assert {*page} == {*POLICIES, "learned"} - {"two_gates"}
    for name, (where, source) in page.items():
        policy = POLICIES.get(name)
        assert (
            policy is None
            or not (number := re.search(r"arXiv (\d+\.\d+)", policy.source))
            or (number[1] in source or number[1] == "2412.00876")
        ), name
        if name == "schedule":
            continue
        if family not in WHERE[where]:
            with pytest.raises(UserError, match=rf"{re.escape(name)}:? needs [^\n]*$"):
                model.set_sparsity(policy=name)
            continue
        model.set_sparsity(policy=name)
        together = model(**batch, logits_to_keep=1).logits[1, -1]
        torch.testing.assert_close(together, model(**alone[1], logits_to_keep=1).logits[0, -1], **CLOSE)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_sizes_that_are_missing_or_of_other_pictures_are_one_line(family):
    model = model_of(family)
    model.set_sparsity(mode="full")
    batch, _, _ = batch_for(family, SIZES)
    name = model.image_needs[1]
    with pytest.raises(UserError, match=f"{name}: missing"):
        model(**{key: value for key, value in batch.items() if key != name})
    other = batch[name] * 3
    with pytest.raises(UserError, match=f"pixel_values: do not fit {name}|image tokens"):
        model(**{**batch, name: other})
    alone = {key: value for key, value in batch.items() if key not in model.image_inputs}
    alone["mm_encoder_outputs"] = {"image": model.encode("image", batch)}
    if "qwen" in family:  # positions are made of the sizes
        with pytest.raises(UserError, match=f"^{name}.*: not those of the image"):
            model.generate(**alone, max_new_tokens=1)
        alone[name] = batch[name]
    options = dict(do_sample=False, max_new_tokens=3)
    assert torch.equal(model.generate(**alone, **options), model.generate(**batch, **options))


def test_print_tells_the_policy():
    model = model_of("qwen2_5_vl")
    model.set_sparsity(policy="fastv,k=2,keep=0.25")
    assert "policy=fastv, gates at layers: 2, keep rate of image tokens: 0.25" in repr(model)
    model.set_sparsity(mode="full")
    assert "policy=full, gates at layers: none, keep rate of image tokens: 1" in repr(model)


def test_an_attention_implementation_without_column_masks_is_refused():
    model = model_of("qwen2_5_vl", "eager")
    model._llm.config._attn_implementation_internal = "flex_attention"
    try:
        with pytest.raises(UserError, match="attn_implementation: 'flex_attention' is not supported"):
            model(**batch_for("qwen2_5_vl", SIZES)[0])
    finally:
        model._llm.config._attn_implementation_internal = "eager"
