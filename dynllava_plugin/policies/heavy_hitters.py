"""KV caches that let tokens go by the attention they see, and H2O's: every head lets those go that have received least.

Lengths are the same for all heads and layers of a sample; which tokens fill them differs from head to head. A token that
goes is overwritten by the last one of its head: order in the cache has no meaning, positions are in the keys.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from dynllava_plugin.policies.points import ranks
from dynllava_plugin.sparsity.cache import RaggedLayer, SparseContextCache
from dynllava_plugin.sparsity.selection import pick
from dynllava_plugin.sparsity.tracks import Chunk, ContextTrack, Prefill, chosen, packing_order

BLOCK = 256  # prompt rows whose attention is computed at once


class CutTrack(ContextTrack):
    """A track that holds no more tokens than a subclass's `budget` says."""

    def reset(self) -> None:
        """Hold nothing."""
        super().reset()
        # Tensors from the first call on.
        self.arriving: Any = None  # bool [B, q] of this call
        self.mask: torch.Tensor | None = None  # bool [B, 1, q, K], None where everything may be seen
        self.full: Any = None  # int64 [B] tokens held before this call's eviction

    def budget(self, keep: torch.Tensor) -> torch.Tensor | None:
        """Return int64 [B], how many tokens may stay behind a call of tokens `keep` bool [B, q]; None where all may."""
        raise NotImplementedError

    def begin(self, keep: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor | None:
        """Plan as `ContextTrack.begin`, and how many of the tokens each sample holds must go."""
        first = self.lengths is None
        self.mask, self.arriving = super().begin(keep, counts), keep
        assert self._pending is not None
        self.full = self._pending
        budget = self.budget(keep)
        if budget is not None:
            self._pending = torch.minimum(self.full, budget)
        if first:
            self._pending_bound = int(self._pending.max())
            self.capacity = self._pending_bound + self.growth_step
        return self.mask


class HeavyHitterTrack(CutTrack):
    """A track whose samples hold at most max(1, floor(r * seen)) tokens."""

    seen: Any = None  # int64 [B] tokens that entered
    recent: Any = None  # int64 [B] of those that stay, the ones safe for being new

    def __init__(self, r: float) -> None:
        self.r = r
        super().__init__()

    def reset(self) -> None:
        """Hold nothing."""
        super().reset()
        self.seen = None

    def budget(self, keep: torch.Tensor) -> torch.Tensor:
        """Return max(1, floor(r * seen)), int64 [B], with this call's tokens seen."""
        entering = keep.sum(1)
        self._seen_then = entering if self.seen is None else self.seen + entering
        return share_of(self._seen_then, self.r)

    def begin(self, keep: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor | None:
        """Plan as `CutTrack.begin`, and which tokens are too new to go."""
        mask = super().begin(keep, counts)
        self.recent = (self._pending + 1) // 2  # type: ignore[operator]
        return mask

    def commit(self) -> None:
        """Advance the lengths after every layer has carried out the plan."""
        super().commit()
        self.seen = self._seen_then

    def index(self, rows: torch.Tensor) -> None:
        """Replace the samples by `rows` int64 [B'] of the present ones."""
        super().index(rows)
        if self.seen is not None:
            self.seen = chosen(self.seen, rows)


def share_of(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Return max(1, floor(share * tokens)) of numbers int64 [B], without rounding: 0.59 of 100 are 59."""
    exact = Fraction(share).limit_denominator(10**6)
    return (tokens * exact.numerator // exact.denominator).clamp(min=1)


def pick_of_heads(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return states [B, H, n, D] of `states` [B, H, L, D] at `places` int64 [B, H, n]."""
    return pick(states.flatten(0, 1), places.flatten(0, 1)).view(*places.shape, -1)


class ObservedLayer(RaggedLayer):
    """Keys and values whose prompt is stored by a subclass's `observe`, once its attention is known."""

    _prompt: Any = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store as `RaggedLayer.update`; a prompt waits."""
        if isinstance(self.track.plan, Prefill):
            self._prompt = (key_states, value_states)
            return key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def observe(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """See rotated queries [B, H, q, D] and keys [B, H_kv, K, D] after they were attended, and let tokens go."""
        raise NotImplementedError


class ObservedCache(SparseContextCache):
    """A cache whose tracks from the first of `splits` on are `tracks`, with layers of a kind that sees what they attend."""

    observes = True

    def __init__(
        self, num_layers: int, splits: Sequence[int], rule: object, layer: type, tracks: Sequence[CutTrack]
    ) -> None:
        super().__init__(num_layers, splits)
        self.rule = rule
        self.tracks[1:] = tracks
        for index in range(self.splits[0], num_layers):
            self.layers[index] = layer(self.tracks[bisect_right(self.splits, index)])

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Show a layer what it attended, as `ObservedLayer.observe`."""
        if layer >= self.splits[0]:
            self.layers[layer].observe(query, key, scaling)


class HeavyHitterLayer(ObservedLayer):
    """Keys, values, the attention each token has received (float32 [B, H_kv, capacity]) and its order number (int32)."""

    track: HeavyHitterTrack
    received: Any = None  # tensors from the prompt on
    number: Any = None

    def observe(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Add what the queries attend, and let tokens go."""
        plan = self.track.plan
        if isinstance(plan, Prefill):
            self._store_prompt(query, key, plan.order, scaling)
        elif isinstance(plan, Chunk):
            self._add_chunk(plan, query, key, scaling)
        else:
            self._add_step(query, key, scaling)

    def _store_prompt(
        self, query: torch.Tensor, key: torch.Tensor, order: torch.Tensor | None, scaling: float
    ) -> None:
        track = self.track
        length = query.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        received = self._received(query, key, causal & track.arriving[:, None, None], scaling)
        keys, values = self._prompt
        if order is not None:
            received, keys, values = (
                pick(x.transpose(1, 2), order).transpose(1, 2) for x in (received, keys, values)
            )
        number = torch.arange(received.shape[2], dtype=torch.int32, device=query.device).expand_as(received)
        self._keep_best(keys, values, received, number, track.full)
        self.is_initialized = True
        self._prompt = None

    def _add_step(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        track = self.track
        assert track.lengths is not None and track._pending is not None
        self._grow_marks()
        rows = torch.arange(query.shape[0], device=query.device)
        last, bound = track.lengths, key.shape[2]
        self.received[rows, :, last] = 0
        self.number[rows, :, last] = track.seen[:, None].to(torch.int32)
        slots = torch.arange(bound, device=query.device)
        mask = (slots <= last[:, None])[:, None, None]
        self.received[:, :, :bound] += self._received(query, key, mask, scaling)
        evicts = track.full > track._pending  # at most one a sample: a budget never shrinks
        old = self.number[:, :, :bound] < (track._seen_then - track.recent)[:, None, None]
        scores = self.received[:, :, :bound].masked_fill(~(old & (slots <= last[:, None])[:, None]), math.inf)
        leaving = torch.where(evicts[:, None], scores.argmin(-1), last[:, None])  # [B, H_kv]
        heads = torch.arange(leaving.shape[1], device=query.device)
        for buffer in (self.keys, self.values, self.received, self.number):
            buffer[rows[:, None], heads, leaving] = buffer[rows[:, None], heads, last[:, None]]

    def _add_chunk(self, plan: Chunk, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        track = self.track
        self._grow_marks()
        received = self._received(query, key, track.mask, scaling)
        self.received[:, :, : plan.bound] += received[:, :, : plan.bound]
        self.received[plan.rows, :, plan.slots] = received[plan.rows, :, plan.bound + plan.columns]
        numbers = track.seen[:, None] + track.arriving.cumsum(1) - 1
        self.number[plan.rows, :, plan.slots] = numbers[plan.rows, plan.columns, None].to(torch.int32)
        capacity = self.keys.shape[2]
        self._keep_best(self.keys, self.values, self.received, self.number, track.full, capacity)

    def _received(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """Return float32 [B, H_kv, K], the attention that each key receives from this call's real tokens, by blocks of rows."""
        batch, heads, length, width = query.shape
        groups = key.shape[1]
        query = query.view(batch, groups, heads // groups, length, width)
        total = torch.zeros(batch, groups, key.shape[2], dtype=torch.float32, device=key.device)
        for start in range(0, length, BLOCK):
            block = slice(start, start + BLOCK)
            scores = torch.einsum("bhgqd,bhkd->bhgqk", query[:, :, :, block], key).float() * scaling
            if mask is not None:
                visible = mask[:, :, block] if mask.shape[2] > 1 else mask
                scores = scores.masked_fill(~visible[:, :, None], torch.finfo(torch.float32).min)
            weights = scores.softmax(-1) * self.track.arriving[:, None, None, block, None]
            total += weights.sum((2, 3))
        return total

    def _keep_best(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        received: torch.Tensor,
        number: torch.Tensor,
        held: torch.Tensor,
        capacity: int | None = None,
    ) -> None:
        """Fill the buffers with the recent tokens and heaviest others of the first `held` [B] slots."""
        track = self.track
        assert track._pending is not None
        batch, heads, length = received.shape
        slots = torch.arange(length, device=received.device)
        there = (slots < held[:, None])[:, None]
        fresh = number >= (track._seen_then - track.recent)[:, None, None]
        score = received.masked_fill(fresh, math.inf).masked_fill(~there, -math.inf)
        stays = ranks(score) < track._pending[:, None, None]
        order = packing_order(stays.flatten(0, 1)).view(batch, heads, -1)
        room = (capacity or track.capacity) - order.shape[2]
        pad = torch.nn.functional.pad
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = (pad(pick_of_heads(x, order), (0, 0, 0, room)) for x in (keys, values))
        self.received = pad(received.gather(2, order), (0, room))
        self.number = pad(number.gather(2, order), (0, room))

    def _grow_marks(self) -> None:
        missing = self.keys.shape[2] - self.received.shape[2]
        if missing > 0:
            self.received = torch.nn.functional.pad(self.received, (0, missing))
            self.number = torch.nn.functional.pad(self.number, (0, missing))

    def tensors(self) -> list[torch.Tensor]:
        """Return keys and values, and what ranks them."""
        return [*super().tensors(), *([self.received, self.number] if self.is_initialized else [])]

    def index(self, rows: torch.Tensor) -> None:
        """Replace the samples by `rows` int64 [B'] of the present ones."""
        super().index(rows)
        if self.is_initialized:
            self.received, self.number = chosen(self.received, rows), chosen(self.number, rows)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.received = self.number = None
