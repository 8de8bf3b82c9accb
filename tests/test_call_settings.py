"""A policy belongs to a call: threads with different ones get what each would get alone, and `set_sparsity` disturbs none."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dynllava_plugin.errors import UserError
from tests.tiny_random import batch_of, random_model, random_sample

POLICIES = ["full", "image", "image_text", "fastv,k=2", "h2o,r=0.5", "divprune"]


@pytest.fixture
def model():
    return random_model()


def batches():
    rng = random.Random(5)
    return [
        batch_of([random_sample(rng, images, text) for images, text in ((1, 3), (2, 6))]) for _ in POLICIES
    ]


def generate(model, batch, **options):
    return model.generate(**batch, do_sample=False, max_new_tokens=12, min_new_tokens=12, **options)


def test_a_policy_of_a_call_is_the_models_for_that_call(model):
    for policy, batch in zip(POLICIES, batches(), strict=True):
        model.set_sparsity(policy=policy)
        expected = generate(model, batch)
        model.set_sparsity(mode="image_text")
        assert torch.equal(generate(model, batch, policy=policy), expected), policy
        with model.policy_in_force(policy), torch.no_grad():
            inside = model(**batch).logits
        model.set_sparsity(policy=policy)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, inside)
    assert model.config.sparsity.policy == POLICIES[-1]


def test_threads_get_what_each_would_get_alone(model):
    """While another thread changes the model's own settings all the time."""
    drawn = batches()
    expected = [generate(model, batch, policy=policy) for policy, batch in zip(POLICIES, drawn, strict=True)]
    stop = False

    def disturb():
        while not stop:
            for policy in ("random,r=0.1", "full", "image"):
                model.set_sparsity(policy=policy)

    with ThreadPoolExecutor(len(POLICIES) + 1) as pool:
        pool.submit(disturb)
        try:
            for _ in range(3):
                tasks = [
                    pool.submit(generate, model, b, policy=p) for p, b in zip(POLICIES, drawn, strict=True)
                ]
                found = [task.result() for task in tasks]
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        finally:
            stop = True


def test_generate_keeps_the_models_policy_of_its_start(model):
    """`set_sparsity` from a streamer in the middle of a generation changes the next one only."""
    batch = batches()[0]
    single = {key: value[:1] for key, value in batch.items()} | {"pixel_values": batch["pixel_values"][:1]}
    model.set_sparsity(mode="image_text")
    expected = generate(model, single)

    class Streamer:
        def put(self, value):
            model.set_sparsity(mode="full")

        def end(self):
            pass

    assert torch.equal(generate(model, single, streamer=Streamer()), expected)
    assert model.config.sparsity.mode == "full"


def test_an_unknown_policy_of_a_call(model):
    with pytest.raises(UserError, match="policy: unknown value 'nope'"):
        generate(model, batches()[0], policy="nope")
