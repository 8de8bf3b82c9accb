"""Questions that share their images' prefill get the answers of whole prompts, whatever the policy."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.model.shared_prefill import LEAST_SAVED, share_prefill
from dynllava_plugin.policies import POLICIES, policy_of
from dynllava_plugin.policies.registry import policy_changes
from dynllava_plugin.sparsity.config import SparsityConfig
from tests.policy_cases import cases
from tests.property_tests import examples
from tests.test_equivalence import CLOSE
from tests.tiny_random import IMAGE_TOKEN, TOKENS_PER_IMAGE, Sample, batch_of, random_model, random_sample

MODEL = random_model()
STEPS, PAD = 5, 81  # a token that no sample has
# Of each scene: its images and how many questions are about them; then the questions' lengths.
scenes_strategy = st.lists(
    st.tuples(st.integers(1, 2), st.lists(st.integers(1, 9), min_size=2, max_size=4)), min_size=1, max_size=3
)


def reads_question(text):
    return policy_of(SparsityConfig().replace(**policy_changes({"policy": text}))).reads_question


def questions(rng, scenes):
    """Samples in random order, and which scene each is about."""
    made = []
    for scene, (images, lengths) in enumerate(scenes):
        seen = random_sample(rng, images, 0)
        for length in lengths:
            made.append(
                (scene, Sample([*seen.ids, *(rng.randrange(3, 80) for _ in range(length))], seen.images))
            )
    rng.shuffle(made)
    return [sample for _, sample in made], [scene for scene, _ in made]


def shared_of(samples, scenes, batch, least_saved=LEAST_SAVED):
    def encode(rows):
        pixels = torch.cat([samples[row].images for row in rows])
        return {"image": MODEL.get_image_features(pixel_values=pixels, return_dict=True)}

    return share_prefill(
        MODEL, batch["input_ids"], batch["attention_mask"], scenes, encode, TOKENS_PER_IMAGE, PAD, least_saved
    )


def generated(**inputs):
    out = MODEL.generate(
        **inputs,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], out.past_key_values


@examples(6)
@given(seed=st.integers(0, 2**20), scenes=scenes_strategy)
@pytest.mark.parametrize(**cases(lambda case: not reads_question(case.text)))
def test_shared_prompts_answer_as_whole_ones(case, seed, scenes):
    MODEL.set_sparsity(policy=case.text)
    samples, about = questions(random.Random(seed), scenes)
    batch = batch_of(samples)
    with torch.no_grad():
        logits, tokens, cache = generated(**batch)
        inputs = shared_of(samples, about, batch, least_saved=0)
        assert inputs["cache"].get_seq_length() < inputs["input_ids"].shape[1]
        assert torch.equal(inputs["attention_mask"].sum(1), batch["attention_mask"].sum(1))
        assert torch.equal(inputs["input_ids"] != PAD, inputs["attention_mask"].bool())
        shared_logits, shared_tokens, shared_cache = generated(**inputs)
    torch.testing.assert_close(shared_logits, logits, **CLOSE)
    assert torch.equal(shared_tokens, tokens)
    assert torch.equal(shared_cache.kept_lengths(), cache.kept_lengths())
    if cache.output_keep() is not None:
        assert torch.equal(shared_cache.output_keep(), cache.output_keep())


def test_who_reads_the_question():
    reading = {name for name, policy in POLICIES.items() if policy.reads_question}
    assert reading >= {"fastv", "h2o", "cdpruner", "pyramiddrop", "dart", "snapkv"}
    assert not reading & {"full", "image", "image_text", "text", "random", "random_text", "structure"}
    assert not reading & {"downsample", "visionzip", "divprune", "prumerge+"}


@pytest.mark.parametrize(**cases(lambda case: reads_question(case.text)))
def test_a_policy_that_reads_the_question_shares_nothing(case):
    MODEL.set_sparsity(policy=case.text)
    samples, about = questions(random.Random(0), [(1, [2, 3, 4])])
    assert MODEL._llm.policy.reads_question
    assert shared_of(samples, about, batch_of(samples)) is None


def system_prompt(samples, length, rng):
    """The same words before everything, so that they are most of what isn't an image."""
    words = [rng.randrange(3, 80) for _ in range(length)]
    return [Sample([1, *words, *sample.ids[1:]], sample.images) for sample in samples]


@examples(4)
@given(seed=st.integers(0, 2**20), scenes=scenes_strategy)
@pytest.mark.parametrize(**cases(lambda case: not reads_question(case.text)))
def test_words_before_the_first_image_are_shared_by_all(case, seed, scenes):
    """No two prompts have the same images; those are then behind the cache."""
    MODEL.set_sparsity(policy=case.text)
    rng = random.Random(seed)
    samples = [random_sample(rng, images, lengths[0]) for images, lengths in [*scenes, (1, [3])]]
    samples = system_prompt(samples, 40, rng)
    batch = batch_of(samples)
    with torch.no_grad():
        logits, tokens, cache = generated(**batch)
        inputs = shared_of(samples, list(range(len(samples))), batch, least_saved=0)
        shared_logits, shared_tokens, shared_cache = generated(**inputs)
    assert shared_cache.tracks[0].lengths.tolist() == cache.tracks[0].lengths.tolist()
    torch.testing.assert_close(shared_logits, logits, **CLOSE)
    assert torch.equal(shared_tokens, tokens)
    assert torch.equal(shared_cache.kept_lengths(), cache.kept_lengths())
    if cache.images_kept is not None:
        assert torch.equal(shared_cache.images_kept, cache.images_kept)


def test_the_split_that_saves_more_is_taken():
    MODEL.set_sparsity(policy="image_text")
    rng = random.Random(1)
    samples, about = questions(rng, [(1, [2, 3]), (1, [4, 2])])
    samples = system_prompt(samples, 4, rng)
    columns = shared_of(samples, about, batch_of(samples))["cache"].get_seq_length()
    assert columns >= 5 + 16  # with the image
    samples = system_prompt(samples, 60, rng)
    different = shared_of(samples, range(4), batch_of(samples))["cache"].get_seq_length()
    assert 65 <= different < 65 + 16  # without


def test_where_nothing_can_be_shared():
    """Questions without an image, images that differ behind equal words, and words that differ before equal images."""
    MODEL.set_sparsity(policy="image_text")
    rng = random.Random(0)
    samples, about = questions(rng, [(1, [2, 3])])
    mixed = [*samples, random_sample(rng, 0, 5)]
    assert shared_of(mixed, [*about, 1], batch_of(mixed)) is None
    assert shared_of(samples, [0, 1], batch_of(samples)) is None
    ending = [
        Sample(sample.ids[:-length], sample.images) for sample, length in zip(samples, (2, 3), strict=True)
    ]
    silent = [sample for sample in ending if sample.ids[-1] == IMAGE_TOKEN]
    assert silent and shared_of([*samples, *silent], [0] * 3, batch_of([*samples, *silent])) is None
    samples[1].ids[0] += 1
    assert shared_of(samples, about, batch_of(samples)) is None
    many, scenes = questions(rng, [(1, [2]), (1, [3]), (1, [4]), (1, [2]), (1, [5, 4])])
    assert shared_of(many, scenes, batch_of(many)) is None  # one beginning of six isn't worth a second call
