"""The KV cache of Eq. 6: per sample, layers before l hold every token and layers from l on the kept ones only.

A cache has two `ContextTrack`s, one for each kind of layer. A track knows how many tokens each sample holds and plans, once a
forward call, where new keys and values go; its layers carry the plan out. Samples are ragged: sample b owns the slots
0..lengths[b]-1. A new token is written at slot lengths[b], sees slots 0..lengths[b], and stays only if lengths[b] then
advances; a skipped token is overwritten by the next one. No step loops over samples.

A static cache keeps its tensors where they are and lets a step attend a whole buffer behind a mask, so that a step has one shape
and never waits for the device: what CUDA graphs and `torch.compile` need. It grows between steps, in larger steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from dynllava_plugin.sparsity.buffers import grown, zeros

GROWTH_STEP = 64  # slots
MASK_ALIGNMENT = 8  # slots
STATIC_GROWTH_STEP = 256  # slots; a static cache's growth also costs a new capture


def packing_order(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] bool -> (int64 [B, n] columns of the kept tokens in order, first ones first; int64 [B] counts).

    n is the largest count. Rows with fewer kept tokens end in columns that are not kept.
    """
    counts = keep.sum(1)
    order = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : int(counts.max())], counts


@dataclass
class _Prefill:
    """First tokens: attend to each other, then the kept ones are packed into fresh buffers."""

    order: torch.Tensor | None  # [B, n] columns to store, None for all of them


@dataclass
class _Step:
    """One token a sample: written in place at `slots` [B], which attends the first `bound` slots."""

    slots: torch.Tensor
    bound: int


@dataclass
class _Chunk:
    """Several tokens a sample behind a context of `bound` slots; token `columns[i]` of sample `rows[i]` stays, at `slots[i]`."""

    rows: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor
    bound: int


class ContextTrack:
    """How many tokens each sample holds in one kind of layer, and where the tokens of this call go."""

    def __init__(self, growth_step: int = GROWTH_STEP) -> None:
        self.growth_step = growth_step
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.lengths: torch.Tensor | None = None  # int64 [B]
        self.bound = 0  # host-side upper bound of lengths, so that a step needs no device synchronisation
        self.capacity = 0  # slots of the layers' buffers
        self.plan: _Prefill | _Step | _Chunk | None = None
        self._pending: torch.Tensor | None = None
        self._pending_bound = 0

    def begin(self, keep: torch.Tensor) -> torch.Tensor | None:
        """Plan the call for new tokens.

        Parameters
        ----------
        keep : bool [B, q]
            Tokens that stay as context; padding, at either end, is False.

        Returns
        -------
        bool [B, 1, q, K] of what each new token may see, or None at prefill, where the caller has its own causal mask, and
        where everything may be seen.
        """
        if self.lengths is None:
            everything = bool(keep.all())
            order, counts = packing_order(keep)
            self.plan = _Prefill(order=None if everything else order)
            self._pending, self._pending_bound = counts, order.shape[1]
            self.capacity = order.shape[1] + self.growth_step
            return None
        if keep.shape[1] == 1:
            return self._begin_step(self.lengths, keep[:, 0])
        return self._begin_chunk(self.lengths, keep)

    def _begin_step(self, lengths: torch.Tensor, keep: torch.Tensor) -> torch.Tensor | None:
        # Reading a length is free on the CPU; elsewhere the bound is refreshed only when the buffers would grow.
        exact = lengths.device.type == "cpu"
        if exact or self.bound >= self.capacity:
            self.bound = int(lengths.max())
        bound = self.bound + 1
        self._reserve(bound)
        self.plan = _Step(slots=lengths, bound=bound)
        self._pending, self._pending_bound = lengths + keep, bound
        if exact and int(lengths.min()) == self.bound:
            return None
        return (torch.arange(bound, device=lengths.device) <= lengths[:, None])[:, None, None]

    def _begin_chunk(self, lengths: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        self.bound = int(lengths.max())
        length = keep.shape[1]
        rows, columns = keep.nonzero(as_tuple=True)
        slots = (lengths[:, None] + keep.cumsum(1) - 1)[rows, columns]
        self.plan = _Chunk(rows=rows, columns=columns, slots=slots, bound=self.bound)
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
        self.plan = self._pending = None

    def index(self, rows: torch.Tensor) -> None:
        """Replace the samples by `rows` int64 [B'] of the present ones."""
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, rows.to(self.lengths.device))


class StaticTrack(ContextTrack):
    """A track whose single-token steps have one shape and touch no host value: they see `capacity` slots behind a mask."""

    def begin(self, keep: torch.Tensor) -> torch.Tensor | None:
        """As `ContextTrack.begin`, with a capacity that attention kernels take without padding the mask."""
        first = self.lengths is None
        mask = super().begin(keep)
        if first:
            self.capacity = -(-self.capacity // MASK_ALIGNMENT) * MASK_ALIGNMENT
        return mask

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
        self.plan, self._pending = _Step(slots=lengths, bound=self.capacity), keep[:, 0]  # type: ignore[arg-type]
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

    def index(self, rows: torch.Tensor) -> None:
        """Replace the samples by `rows`, in place where their number stays."""
        lengths = self.lengths
        super().index(rows)
        if lengths is not None and self.lengths.shape == lengths.shape:  # type: ignore[union-attr]
            self.lengths = lengths.copy_(self.lengths)  # type: ignore[arg-type]


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer: two [B, H_kv, capacity, D] buffers that grow in steps."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, track: ContextTrack) -> None:
        super().__init__()
        self.track = track

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty buffers of the track's capacity, in the states' dtype and on their device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = zeros(key_states, self.track.capacity)
        self.values = zeros(value_states, self.track.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, H_kv, q, D] as the track has planned; returns the [B, H_kv, K, D] pair to attend to."""
        plan = self.track.plan
        if plan is None:
            raise RuntimeError(
                "RaggedLayer.update without a plan: this cache is filled by DynamicLlamaModel.forward"
            )
        if isinstance(plan, _Prefill):
            self.lazy_initialization(key_states, value_states)
            for buffer, states in ((self.keys, key_states), (self.values, value_states)):
                packed = states if plan.order is None else _gather_tokens(states, plan.order)
                buffer[:, :, : packed.shape[2]] = packed
            return key_states, value_states
        self.grow()
        if isinstance(plan, _Step):
            rows = torch.arange(key_states.shape[0], device=key_states.device)
            self.keys[rows, :, plan.slots] = key_states[:, :, 0]
            self.values[rows, :, plan.slots] = value_states[:, :, 0]
            return self.keys[:, :, : plan.bound], self.values[:, :, : plan.bound]
        attended = (
            torch.cat([self.keys[:, :, : plan.bound], key_states], dim=2),
            torch.cat([self.values[:, :, : plan.bound], value_states], dim=2),
        )
        self.keys[plan.rows, :, plan.slots] = key_states[plan.rows, :, plan.columns]
        self.values[plan.rows, :, plan.slots] = value_states[plan.rows, :, plan.columns]
        return attended

    def grow(self) -> None:
        """Make the buffers as large as the track's capacity where they are smaller."""
        capacity = self.track.capacity
        if capacity > self.keys.shape[2]:
            self.keys, self.values = grown(self.keys, capacity), grown(self.values, capacity)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedLayer:
        """Copies what is held, not the address space behind it."""
        memo[id(self)] = new = copy.copy(self)
        for name, value in vars(self).items():
            held = value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value, memo)
            setattr(new, name, held)
        return new

    def index(self, rows: torch.Tensor) -> None:
        """Replace the samples by `rows` int64 [B'] of the present ones."""
        if self.is_initialized:
            keys = self.keys.index_select(0, rows.to(self.keys.device))
            values = self.values.index_select(0, rows.to(self.values.device))
            if isinstance(self.track, StaticTrack) and keys.shape == self.keys.shape:
                self.keys.copy_(keys)
                self.values.copy_(values)
            else:
                self.keys, self.values = keys, values

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.track.bound + query_length, 0

    def get_seq_length(self) -> int:
        """Slots in use by the longest sample (an upper bound on devices other than the CPU)."""
        return self.track.bound

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


class SparseContextCache(Cache):
    """KV cache of a Dynamic-LLaVA model; `generate()` makes one by itself.

    Parameters
    ----------
    num_layers : int
        L, decoder layers.
    sparse_layer : int
        l: layers 0..l-1 hold every token, layers l..L-1 the kept ones.
    growth_step : int
        Slots by which the buffers grow.
    static : bool
        Steps of one shape that never wait for the device, see the module's text.
    """

    def __init__(
        self, num_layers: int, sparse_layer: int, growth_step: int | None = None, static: bool = False
    ) -> None:
        track = StaticTrack if static else ContextTrack
        growth_step = growth_step or (STATIC_GROWTH_STEP if static else GROWTH_STEP)
        self.dense, self.sparse = track(growth_step), track(growth_step)
        self.static = static
        self.sparse_layer = sparse_layer
        self.rule: object = None  # by which tokens leave the sparse layers later; None: they don't
        self.watch: Any = None  # sees queries and keys of the sparse layers, where a cache ranks by attention
        self._forget()
        super().__init__(
            layers=[RaggedLayer(self.dense if i < sparse_layer else self.sparse) for i in range(num_layers)]
        )

    def _forget(self) -> None:
        self.seen = 0  # columns processed, padding included: what generate() slices its inputs by
        self.removed: torch.Tensor | None = None  # int64 [B, 1] image tokens that never entered the LLM
        self.moved_up: torch.Tensor | None = None  # by how much later tokens' position ids are less for it
        self.images_kept: torch.Tensor | None = None  # int64 [B] image tokens behind the policy's decision
        self._output_keep: list[torch.Tensor] = []

    def note_removed(self, count: torch.Tensor, packed: bool) -> None:
        """Image tokens int64 [B, 1] that don't enter the LLM; with `packed` positions what follows moves up."""
        self.removed = count if self.removed is None else self.removed + count
        self.moved_up = self.removed if packed else None

    def commit(
        self, columns: int, output_keep: torch.Tensor | None, image_keep: torch.Tensor | None = None
    ) -> None:
        """End a forward call over `columns` new columns: decisions on its output (bool [B, q]) and image tokens ([B, N_img])."""
        self.dense.commit()
        self.sparse.commit()
        self.note(columns, output_keep, image_keep)

    def next_positions(self) -> torch.Tensor:
        """int64 [B, 1]: the position id of each sample's next token, by the input's count."""
        assert self.dense.lengths is not None
        lengths = self.dense.lengths[:, None]
        return lengths if self.removed is None else lengths + self.removed

    def note(
        self, columns: int, output_keep: torch.Tensor | None, image_keep: torch.Tensor | None = None
    ) -> None:
        """Host-side end of a call: its columns and its decisions on output (bool [B, q]) and image tokens ([B, N_img])."""
        self.seen += columns
        if output_keep is not None:
            self._output_keep.append(output_keep)
        if image_keep is not None:
            kept = image_keep.sum(1)
            self.images_kept = kept if self.images_kept is None else self.images_kept + kept

    def reserve_step(self) -> None:
        """Room for one more token in a static cache; before a step, outside any graph."""
        grown = [
            track.reserve_step() for track in (self.dense, self.sparse) if isinstance(track, StaticTrack)
        ]
        if any(grown):
            for layer in self.layers:
                layer.grow()

    def step_slots(self, layer_idx: int) -> torch.Tensor | None:
        """int64 [B]: where a layer's new tokens lie during a single-token step; None during any other call."""
        plan = self.layers[layer_idx].track.plan
        return plan.slots if isinstance(plan, _Step) else None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that a decode step reads and writes."""
        buffers = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return [
            length for length in (self.dense.lengths, self.sparse.lengths) if length is not None
        ] + buffers

    def addresses(self) -> tuple[int, ...]:
        """Where `tensors` lie; another answer ends a captured step's life."""
        return tuple(tensor.data_ptr() for tensor in self.tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns processed so far, padding included; `kept_lengths` tells what is held."""
        return self.seen

    def kept_lengths(self) -> torch.Tensor:
        """int64 [L, B]: tokens held per layer and sample."""
        if self.dense.lengths is None or self.sparse.lengths is None:
            return torch.zeros(len(self.layers), 0, dtype=torch.int64)
        return torch.stack([layer.track.lengths for layer in self.layers])

    def output_keep(self) -> torch.Tensor | None:
        """bool [B, T]: the decision on each output token fed so far, in order; None before the first."""
        return torch.cat(self._output_keep, dim=1) if self._output_keep else None

    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(
            t.numel() * t.element_size() for x in self.layers if x.is_initialized for t in (x.keys, x.values)
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: sample b continues from sample `beam_idx[b]`."""
        for part in (self.dense, self.sparse, *self.layers):
            part.index(beam_idx)
        self._output_keep = [keep.index_select(0, beam_idx.to(keep.device)) for keep in self._output_keep]
        for name in ("removed", "moved_up", "images_kept"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.index_select(0, beam_idx.to(value.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the samples `indices` (int64) only."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample becomes `repeats` samples in a row."""
        if self.dense.lengths is not None:
            rows = torch.arange(self.dense.lengths.shape[0], device=self.dense.lengths.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, to serve another prompt."""
        for layer in self.layers:
            layer.reset()
        for track in (self.dense, self.sparse):
            track.reset()
        self._forget()

    def crop(self, *args: int, **kwargs: int) -> None:
        """Impossible: a skipped token is gone, so an earlier state can't be restored."""
        raise NotImplementedError(
            "SparseContextCache can't be cropped (skipped tokens are gone); don't use assisted decoding with it"
        )


def _gather_tokens(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] states -> [B, H, n, D] at the columns `order` [B, n]."""
    index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)
