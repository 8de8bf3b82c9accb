"""Prefill in a bucket's shapes against the plain path: same decisions, and logits to 1e-5; captures are bounded and counted."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.model import generation, static_decoding, static_prefill
from dynllava_plugin.model.static_prefill import bucket
from tests.families.checkpoints import FAMILIES, sample_batch, stock_processor
from tests.families.ours import answers_of, model_of
from tests.op_counts import counted
from tests.property_tests import examples
from tests.test_static_decoding import decode
from tests.tiny_random import batch_of, random_model, random_sample

MODEL = random_model()
POLICIES = ("full", "image", "image_text", "fastv,k=2", "fastv,k=3,r=0.9")
CLOSE = dict(rtol=1e-5, atol=1e-5)


def batch_with(seed, texts, images=1, left=True):
    rng = random.Random(seed)
    return batch_of([random_sample(rng, images, text) for text in texts], left)


def batch_of_length(seed, lengths):
    """Prompts of one image and so many tokens."""
    rng = random.Random(seed)
    samples = [random_sample(rng, 1, 1) for _ in lengths]
    for sample, length in zip(samples, lengths, strict=True):
        sample.ids += [rng.randrange(3, 80) for _ in range(length - len(sample.ids))]
    return batch_of(samples)


def prefill(model, batch, cache):
    with torch.no_grad():
        return model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)


def assert_equal(model, batch, answers):
    """The bucket's prefill and steps behind it are the plain ones'."""
    gone, plain, static = model.static_prefill.plain.total(), model.new_cache(), model.new_cache("static")
    expected, found = prefill(model, batch, plain), prefill(model, batch, static)
    assert model.static_prefill.plain.total() == gone
    torch.testing.assert_close(found.logits, expected.logits[:, -1:], **CLOSE)
    assert (found.image_keep is None) == (expected.image_keep is None)
    if found.image_keep is not None:
        assert torch.equal(found.image_keep, expected.image_keep)
        assert torch.equal(static.images_kept, plain.images_kept)
        if expected.image_score is not None:
            torch.testing.assert_close(found.image_score, expected.image_score, **CLOSE)
    assert torch.equal(static.kept_lengths(), plain.kept_lengths())
    assert torch.equal(static.next_positions(), plain.next_positions()) and static.seen == plain.seen
    for ours, theirs in zip(static.layers, plain.layers, strict=True):
        for row, length in enumerate(theirs.track.lengths.tolist()):
            torch.testing.assert_close(ours.keys[row, :, :length], theirs.keys[row, :, :length], **CLOSE)
            torch.testing.assert_close(ours.values[row, :, :length], theirs.values[row, :, :length], **CLOSE)
    plain, static = model.new_cache(), model.new_cache("static")
    logits = decode(model, batch, answers, plain)
    torch.testing.assert_close(decode(model, batch, answers, static), logits, **CLOSE)
    assert torch.equal(static.output_keep(), plain.output_keep())


@examples(10)
@given(
    seed=st.integers(0, 2**20),
    texts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    images=st.integers(0, 3),
    left=st.booleans(),
    policy=st.sampled_from(POLICIES),
)
def test_a_buckets_prefill_is_the_plain_one(seed, texts, images, left, policy):
    MODEL.set_sparsity(policy=policy)
    answers = torch.randint(3, 80, (len(texts), 3), generator=torch.Generator().manual_seed(seed))
    assert_equal(MODEL, batch_with(seed, texts, images, left or len(set(texts)) == 1), answers)


def test_with_eager_attention():
    model = random_model(attention="eager", mode="image_text")
    assert_equal(model, batch_with(1, [3, 20, 9]), torch.tensor([[5, 6], [7, 8], [9, 5]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Positions on three axes, features added behind the first layers, tiles."""
    model, sizes = model_of(family), [[(56, 84)], [(56, 84)]]
    batch = sample_batch(family, stock_processor(family), sizes, ["What is this?", "Is there a red circle?"])
    model.set_sparsity(policy="image_text")
    assert_equal(model, batch, answers_of(family, 2, 2, 0))


def test_one_shape_in_a_bucket_and_no_wait_for_a_value(monkeypatch):
    """What a capture asks for: the operations of two prompts of one bucket are the same, and none waits."""
    MODEL.set_sparsity(policy="image_text")
    real, found = static_prefill.prefill_in_shape, []

    def counting(llm, tokens, *args):
        with counted() as count:
            result = real(llm, tokens, *args)
        found.append((count.names, count.reads, tokens.hidden.shape))
        return result

    monkeypatch.setattr(static_prefill, "prefill_in_shape", counting)
    for seed, lengths in enumerate(([51, 50], [46, 52])):
        prefill(MODEL, batch_of_length(seed, lengths), MODEL.new_cache("static"))
    assert len(found) == 2 and found[0] == found[1] and found[0][1] == 0


def test_buckets_waste_little():
    for between, least in ((static_prefill.LENGTHS, 16), (static_prefill.BATCHES, 8)):
        for count in range(1, 3000):
            size = bucket(count, between)
            assert count <= size <= count * (1 + 1 / between) + 1 and bucket(size, between) == size
        assert [bucket(n, between) for n in range(1, least + 1)] == list(range(1, least + 1))
    assert len({bucket(n, static_prefill.LENGTHS) for n in range(1, 4097)}) == 16 + 8 * 16


class Replayed:
    """Stands in for a graph on CUDA: runs the call again on the inputs that it holds."""

    def __init__(self, call, inputs, undo=()):
        before = [tensor.clone() for tensor in undo]
        self.call, self.inputs = call, tuple(tensor.clone() for tensor in inputs)
        call(*self.inputs)
        for tensor, value in zip(undo, before, strict=True):
            tensor.copy_(value)

    def replay(self, inputs):
        for held, value in zip(self.inputs, inputs, strict=True):
            held.copy_(value)
        return self.call(*self.inputs)


@pytest.fixture
def captured(monkeypatch):
    """A model whose steps and prefills are captured, by a stand-in."""
    for module in (static_prefill, static_decoding, generation):
        monkeypatch.setattr(module, "captures", lambda device: True)
    for module in (static_prefill, static_decoding):
        monkeypatch.setattr(module, "Graph", Replayed)
    return copy.deepcopy(MODEL)


def again(model, texts):
    return prefill(model, batch_with(0, texts), model.new_cache())


def test_a_buckets_second_prompt_captures_and_later_ones_replay(captured):
    captured.set_sparsity(policy="image_text")
    prefills = captured.static_prefill
    for seed, lengths in enumerate([[33, 34], [33, 24], [34, 34], [30, 33]]):
        batch = batch_of_length(seed, lengths)
        expected = prefill(captured, batch, captured.new_cache("dynamic"))
        found = prefill(captured, batch, captured.new_cache())
        torch.testing.assert_close(found.logits, expected.logits[:, -1:], **CLOSE)
        assert torch.equal(found.image_keep, expected.image_keep)
    assert (prefills.captured, prefills.replayed) == (1, 3)
    assert prefills.plain == {"a bucket's first prompt": 1}


def test_generate_takes_captured_prefills_and_steps_by_itself(captured):
    captured.set_sparsity(policy="image_text")
    batch = batch_with(3, [4, 9])
    settings = dict(max_new_tokens=6, do_sample=False)
    expected = captured.generate(**batch, cache_implementation="dynamic", **settings)
    for _ in range(3):
        assert torch.equal(captured.generate(**batch, **settings), expected)
    assert captured.static_prefill.replayed == 2


def test_a_policy_that_lets_tokens_go_says_once_that_it_is_not_captured(captured, capsys, monkeypatch):
    monkeypatch.setattr(generation, "_SAID", set())
    captured.set_sparsity(policy="h2o")
    for _ in range(2):
        captured.generate(**batch_with(3, [4]), max_new_tokens=2)
    assert capsys.readouterr().err == "h2o: lets tokens go later, its steps run uncaptured\n"
    assert captured.static_prefill.captured == 0


def test_captures_are_bounded_and_follow_the_weights(captured, monkeypatch, capsys):
    captured.set_sparsity(policy="image")
    prefills = captured.static_prefill
    monkeypatch.setattr(static_prefill, "HELD", 2)
    monkeypatch.setattr(static_prefill, "CAPTURES", 4)
    for text in (5, 50, 150):
        again(captured, [text]), again(captured, [text])
    assert prefills.captured == 3 and len(prefills._graphs) == 2  # the oldest made room
    captured.lm_head.weight.data = captured.lm_head.weight.data.clone()
    llm = captured.model.language_model
    llm.norm.weight.data = llm.norm.weight.data.clone()
    again(captured, [150])
    assert prefills.captured == 4 and len(prefills._graphs) == 1  # those of other weights are gone
    again(captured, [50])
    assert prefills.captured == 4
    assert capsys.readouterr().err.endswith(": 4 buckets were captured already; it runs uncaptured\n")
    twin = copy.deepcopy(captured)
    assert twin.static_prefill.captured == 0 and twin.static_prefill is not prefills


def test_a_bucket_without_room_is_one_line_and_runs_uncaptured(captured, monkeypatch, capsys):
    captured.set_sparsity(policy="image")
    monkeypatch.setattr(static_prefill, "free_bytes", lambda device: 1 << 16)
    outputs = [again(captured, [5]).logits for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2]) and captured.static_prefill.captured == 0
    said = capsys.readouterr().err
    assert said.startswith("prefill of 1 x ") and said.endswith("GiB free; it runs uncaptured\n")
    assert "its graph needs about 0.00 of 0.00 GiB" in said and said.count("\n") == 1


def test_a_capture_that_fails_is_one_line(captured, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    captured.set_sparsity(policy="image")
    monkeypatch.setattr(static_prefill, "Graph", fail)
    outputs = [again(captured, [5]).logits for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "CUDA out of memory. Tried to allocate; it runs uncaptured" in said


def test_modules_that_change_behind_a_graph_are_not_captured(captured, capsys):
    captured.set_sparsity(policy="image")
    captured.model.language_model.layers[1].register_forward_hook(lambda *_: None)
    again(captured, [5]), again(captured, [5])
    assert captured.static_prefill.captured == 0
    assert "has an adapter or a hook; it runs uncaptured" in capsys.readouterr().err


def test_what_a_bucket_cannot_hold_goes_the_plain_way():
    rng, model = random.Random(0), copy.deepcopy(MODEL)
    mixed = batch_of([random_sample(rng, images, 4) for images in (0, 2)])
    answer = torch.tensor([[5, 6], [7, 8]])
    model.set_sparsity(policy="image_text")
    decode(model, mixed, answer, model.new_cache("static"))
    batch = batch_with(0, [9, 5])
    output = torch.zeros_like(batch["input_ids"])
    output[:, -2:] = 1
    prefill(model, {**batch, "output_mask": output}, model.new_cache("static"))
    model.set_sparsity(policy="divprune")
    prefill(model, batch, model.new_cache("static"))
    assert model.static_prefill.plain == {
        "images that differ from sample to sample": 1, "output text in the prompt": 1, "divprune's gates": 1,
    }  # fmt: skip


def test_the_memory_of_a_graph_is_about_its_keys_values_and_a_layers_activations():
    config = MODEL.config.text_config
    needed = static_prefill.prefill_bytes(config, 2, 32, 4)
    states = 2 * 32 * 4 * (2 * 5 * 2 * 8)
    assert states < needed < 5 * states
