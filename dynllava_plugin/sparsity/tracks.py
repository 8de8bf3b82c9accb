"""Who holds how many tokens, and where the next ones go: the bookkeeping of a ragged cache, one track for each segment of layers.

A track plans, once a forward call, where new keys and values go; its layers carry the plan out. Sample b owns the slots
0..lengths[b]-1. No step loops over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROWTH_STEP = 64  # slots
MASK_ALIGNMENT = 8  # slots
STATIC_GROWTH_STEP = 256  # slots; a static cache's growth also costs a new capture


def packing_order(keep: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Return int64 [B, n], the columns of the kept tokens of `keep` bool [B, L] in order, first ones first.

    n is `width`, the largest count, read from the device where it isn't given. Rows with fewer kept tokens end in columns
    that are not kept.
    """
    width = int(keep.sum(1).max()) if width is None else width
    return keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :width]


def chosen(values: torch.Tensor, rows: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """Return the samples `rows` int64 [B'] of values [B, ...]; in the same memory where asked for and B' is B."""
    found = values.index_select(0, rows.to(values.device))
    return values.copy_(found) if in_place and found.shape == values.shape else found


@dataclass
class Prefill:
    """First tokens: attend to each other, then the kept ones are packed into fresh buffers."""

    order: torch.Tensor | None  # int64 [B, n] columns to store, None for all of them
    rows: torch.Tensor | None = None  # int64 [B, 1], the samples, where there are columns


@dataclass
class Step:
    """One token a sample: row `rows[i]` = i is written in place at `slots[i]` and attends the first `bound` slots."""

    slots: torch.Tensor
    bound: int
    rows: torch.Tensor


@dataclass
class Chunk:
    """Several tokens a sample behind a context of `bound` slots; token `columns[i]` of sample `rows[i]` stays, at `slots[i]`."""

    rows: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor
    bound: int


class ContextTrack:
    """How many tokens each sample holds in one segment of layers, and where the tokens of this call go."""

    in_place = False  # whether other samples, as many, are put where the present ones are

    def __init__(self, growth_step: int = GROWTH_STEP) -> None:
        self.growth_step = growth_step
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.lengths: torch.Tensor | None = None  # int64 [B]
        self.bound = 0  # host-side upper bound of lengths, so that a step needs no device synchronisation
        self.capacity = 0  # slots of the layers' buffers
        self.plan: Prefill | Step | Chunk | None = None
        self.held: list[int] | None = None  # `lengths` on the host, where they were read for this call
        self._pending: torch.Tensor | None = None
        self._pending_bound = 0

    def begin(self, keep: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor | None:
        """Plan the call for new tokens, of which `keep` bool [B, q] stay as context; padding, at either end, is False.

        `counts` are how many of each sample, where the host knows; read from the device otherwise. Return bool [B, 1, q, K] of what
        each new token may see, or None at prefill, where the caller has its own causal mask, and where everything may be seen.
        """
        if self.lengths is None:
            counts = keep.sum(1).tolist() if counts is None else counts
            width = max(counts)
            self.plan = Prefill(order=None)
            if min(counts) < keep.shape[1]:
                rows = torch.arange(len(keep), device=keep.device)[:, None]
                self.plan = Prefill(packing_order(keep, width), rows)
            self._pending, self._pending_bound = keep.sum(1), width
            self.capacity = width + self.growth_step
            return None
        if keep.shape[1] == 1:
            return self._begin_step(self.lengths, keep[:, 0])
        return self._begin_chunk(self.lengths, keep)

    def _begin_step(self, lengths: torch.Tensor, keep: torch.Tensor) -> torch.Tensor | None:
        # Where the lengths were read for this call the bound is exact; else it is refreshed when the buffers would grow.
        if self.held is not None:
            self.bound = max(self.held)
        elif self.bound >= self.capacity:
            self.bound = int(lengths.max())
        bound = self.bound + 1
        self._reserve(bound)
        self.plan = Step(lengths, bound, torch.arange(len(lengths), device=lengths.device))
        self._pending, self._pending_bound = lengths + keep, bound
        if self.held is not None and min(self.held) == self.bound:
            return None
        return (torch.arange(bound, device=lengths.device) <= lengths[:, None])[:, None, None]

    def _begin_chunk(self, lengths: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        self.bound = int(lengths.max())
        length = keep.shape[1]
        rows, columns = keep.nonzero(as_tuple=True)
        slots = (lengths[:, None] + keep.cumsum(1) - 1)[rows, columns]
        self.plan = Chunk(rows=rows, columns=columns, slots=slots, bound=self.bound)
        self._pending = lengths + keep.sum(1)
        self._pending_bound = int(self._pending.max())
        self._reserve(self._pending_bound)
        past = torch.arange(self.bound, device=lengths.device) < lengths[:, None]  # [B, bound]
        causal = torch.ones(length, length, dtype=torch.bool, device=lengths.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=lengths.device)
        new = (causal & keep[:, None]) | itself  # [B, q, q]
        return torch.cat([past[:, None].expand(-1, length, -1), new], dim=-1)[:, None]

    def _reserve(self, slots: int) -> None:
        if slots > self.capacity:
            self.capacity = slots + self.growth_step

    def commit(self) -> None:
        """Advance the lengths after every layer has carried out the plan."""
        self.lengths, self.bound = self._pending, self._pending_bound
        self.plan = self._pending = self.held = None

    def index(self, rows: torch.Tensor) -> None:
        """Replace the samples by `rows` int64 [B'] of the present ones."""
        if self.lengths is not None:
            self.lengths = chosen(self.lengths, rows, self.in_place)


class StaticTrack(ContextTrack):
    """A track whose single-token steps have one shape and touch no host value: they see `capacity` slots behind a mask."""

    in_place = True

    def begin(self, keep: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor | None:
        """Plan as `ContextTrack.begin`, with a capacity that attention kernels take without padding the mask."""
        mask = super().begin(keep, counts)
        self.capacity = -(-self.capacity // MASK_ALIGNMENT) * MASK_ALIGNMENT
        return mask

    def plan_whole(self, lengths: torch.Tensor, slots: int) -> None:
        """Plan a first call of `slots` tokens a sample, all stored, of which the first `lengths` int64 [B] are held."""
        self.plan, self.capacity = Prefill(order=None), slots
        self._pending, self._pending_bound = lengths, slots

    def hold(self, lengths: torch.Tensor, bound: int) -> None:
        """Hold `lengths` int64 [B] tokens, at most `bound`."""
        self.lengths, self.bound = lengths, bound
        self.capacity = -(-(bound + self.growth_step) // MASK_ALIGNMENT) * MASK_ALIGNMENT

    def reserve_step(self) -> bool:
        """Count on one more token; whether the buffers have to grow for it.

        The device is asked for the lengths only where the host's upper bound has reached the capacity.
        """
        grows = False
        if self.bound >= self.capacity:
            self.bound = int(self.lengths.max())  # type: ignore[union-attr]
            # With few slots left every further question would come after fewer steps than the last.
            grows = self.bound >= self.capacity - self.growth_step // 16
            self.capacity += self.growth_step if grows else 0
        self.bound += 1
        return grows

    def begin_static(self, keep: torch.Tensor) -> torch.Tensor:
        """Plan a step for bool [B, 1] `keep`, in tensors alone; bool [B, 1, 1, capacity] of the slots the token sees."""
        lengths = self.lengths
        rows = torch.arange(keep.shape[0], device=keep.device)
        self.plan, self._pending = Step(lengths, self.capacity, rows), keep[:, 0]  # type: ignore[arg-type]
        return (torch.arange(self.capacity, device=keep.device) <= lengths[:, None])[:, None, None]  # type: ignore[index]

    def commit_static(self) -> None:
        """Advance the lengths after a step, in place; the host's bound is the caller's affair."""
        self.lengths.add_(self._pending)  # type: ignore[union-attr, arg-type]
        self.plan = self._pending = None

    def commit(self) -> None:
        """Advance the lengths in place after a prefill or a chunk."""
        lengths = self.lengths
        super().commit()
        if lengths is not None:
            self.lengths = lengths.copy_(self.lengths)  # type: ignore[arg-type]
