"""Buffers that grow: contents stay, nothing is copied on the CPU, memory follows what is written."""

from __future__ import annotations

import copy
import io
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.bench.process import resident_bytes
from dynllava_plugin.sparsity import cache as cache_module
from dynllava_plugin.sparsity.cache import RESERVE, RaggedLayer, grown, zeros
from dynllava_plugin.sparsity.tracks import ContextTrack
from tests.tiny_random import batch_of, random_model, random_sample


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]),
    st.lists(st.integers(1, 3000), min_size=1, max_size=4), st.booleans(),
)  # fmt: skip
def test_growing_keeps_the_contents(batch, heads, width, dtype, steps, contiguous):
    like = torch.zeros(batch, heads, 1, width, dtype=dtype)
    slots = 2
    buffer = like.new_zeros(batch, heads, slots, width) if contiguous else zeros(like, slots)
    expected = torch.zeros(batch, heads, slots, width, dtype=dtype)
    for step in steps:
        expected = torch.nn.functional.pad(expected, (0, 0, 0, step))
        slots += step
        buffer = grown(buffer, slots)
        values = torch.randn(batch, heads, width).to(dtype)
        buffer[:, :, slots - 1], expected[:, :, slots - 1] = values, values
        assert torch.equal(buffer, expected)


def test_growing_on_the_cpu_moves_nothing_until_the_reservation_ends():
    buffer = zeros(torch.zeros(2, 4, 1, 8), 10)
    assert grown(buffer, 10 + RESERVE).data_ptr() == buffer.data_ptr()
    assert grown(buffer, 11 + RESERVE).data_ptr() != buffer.data_ptr()


def test_without_reservations_it_grows_by_copying(monkeypatch):
    monkeypatch.setattr(cache_module, "_reserved", lambda like, shape: None)
    buffer = zeros(torch.zeros(2, 4, 1, 8), 10)
    buffer.copy_(torch.randn_like(buffer))
    larger = grown(buffer, 20)
    assert torch.equal(larger[:, :, :10], buffer) and not larger[:, :, 10:].any()
    assert larger.data_ptr() != buffer.data_ptr() and buffer.is_contiguous()


def test_a_copy_of_one_row_grows_into_memory_of_its_own():
    """Its strides must not tell of the reserved space that only the original has."""
    layer = RaggedLayer(ContextTrack(4))
    layer.track.capacity = 8
    layer.lazy_initialization(torch.empty(1, 1, 1, 4), torch.empty(1, 1, 1, 4))
    layer.keys.fill_(1.0)
    twin = copy.deepcopy(layer)
    twin.track.capacity = 12
    twin.grow()
    twin.keys[:, :, 8:] = 2.0
    assert twin.keys.flatten().tolist() == [1.0] * 32 + [2.0] * 16
    assert layer.keys.shape[2] == 8 and float(layer.keys.sum()) == 32


def test_pages_are_given_when_slots_are_written():
    """A short sample beside a long one takes what it holds, page by page, whatever is read."""
    buffer = zeros(torch.empty(2, 1, 1, 1024), 512)  # a page a slot
    page = 4096
    before = resident_bytes([buffer])
    if before is None:
        pytest.skip("the system doesn't tell which pages are in memory")
    buffer[0, :, :500] = 1.0
    buffer[1, :, :20] = 1.0
    assert float(buffer.sum()) == 520 * 1024  # reads the others
    assert 520 * page <= resident_bytes([buffer]) - before <= 530 * page


def test_memory_follows_what_is_written():
    buffer = zeros(torch.zeros(8, 8, 1, 64), 100)  # 67 MB of address space
    before = resident_bytes([buffer])
    if before is None:
        pytest.skip("the system doesn't tell which pages are in memory")
    buffer[:] = 1.0
    written = buffer.numel() * 4
    assert written * 0.8 < resident_bytes([buffer]) - before < written * 1.3
    buffer = grown(buffer, 500)
    assert resident_bytes([buffer]) - before < written * 1.3


def through_a_file(cache):
    """What `torch.save` keeps of a cache: the slots in use."""
    file = io.BytesIO()
    torch.save(cache, file)
    assert file.tell() < 2**18
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize(
    ("policy", "kind"), [("image_text", "dynamic"), ("image_text", "static"), ("h2o,r=0.5", "dynamic")]
)
def test_a_copied_cache_holds_the_same_and_goes_its_own_way(policy, kind, copied):
    model, rng = random_model(), random.Random(0)
    model.set_sparsity(policy=policy)
    batch = batch_of([random_sample(rng, 1, 4)])
    cache = model.new_cache(kind)
    model(**batch, past_key_values=cache, use_cache=True)  # under autograd
    with torch.no_grad():
        model(torch.tensor([[6]]), past_key_values=cache)
        twin = copied(cache)
        expected = model(torch.tensor([[5]]), past_key_values=cache).logits
        assert twin.get_seq_length() == cache.get_seq_length() - 1
        torch.testing.assert_close(model(torch.tensor([[5]]), past_key_values=twin).logits, expected)
    assert twin.layers[3].track is twin.tracks[-1] and twin.layers[0].track is twin.tracks[0]
    assert twin.layers[0].keys.untyped_storage().nbytes() < 2**20


def test_appending_costs_the_same_at_any_length():
    """Storing one token behind 40 times the context takes no longer, growth included (attention itself is not in this)."""
    model = random_model(mode="full")  # one track

    def seconds_per_append(prompt):
        cache = model.new_cache()
        heads, width = 2, 8
        states = torch.randn(4, heads, prompt, width)
        cache.tracks[0].begin(torch.ones(4, prompt, dtype=torch.bool))
        cache.layers[0].update(states, states)
        cache.tracks[0].commit()
        one, keep = torch.randn(4, heads, 1, width), torch.ones(4, 1, dtype=torch.bool)
        times = []
        for _ in range(5):
            start = time.thread_time()  # a busy machine is not a failure
            for _ in range(130):  # two growth steps
                cache.start()
                cache.tracks[0].begin(keep)
                cache.layers[0].update(one, one)
                cache.tracks[0].commit()
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds_per_append(40_000) < 3 * seconds_per_append(1000) + 1e-3
