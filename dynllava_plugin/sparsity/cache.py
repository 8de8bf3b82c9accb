"""The KV cache of Eq. 6: per sample, layers before a gate hold every token that reached them, layers from it on the kept ones only.

A cache has one `ContextTrack` for each segment of layers between two gates. A track knows how many tokens each sample holds
and plans, once a forward call, where new keys and values go; its layers carry the plan out. Samples are ragged: sample b owns
the slots 0..lengths[b]-1. A new token is written at slot lengths[b], sees slots 0..lengths[b], and stays only if lengths[b] then
advances; a skipped token is overwritten by the next one. No step loops over samples.

A static cache keeps its tensors where they are and lets a step attend a whole buffer behind a mask, so that a step has one shape
and never waits for the device: what CUDA graphs and `torch.compile` need. It grows between steps, in larger steps.

On the CPU a buffer [B, H, slots, D] lies in reserved address space: the system gives memory page by page as slots are written, so
that growing copies nothing until the reservation is used up. On other devices growing makes a larger buffer and copies.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from dynllava_plugin.sparsity.tracks import (
    GROWTH_STEP,
    STATIC_GROWTH_STEP,
    ContextTrack,
    Prefill,
    StaticTrack,
    Step,
    chosen,
)

RESERVE = 4096  # slots beyond those asked for
# What transformers' layers, outputs and `generate` call a KV cache: renamed in 5.24.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


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
                "RaggedLayer.update without a plan: this cache is filled by a Dynamic model's forward"
            )
        if isinstance(plan, Prefill):
            self.lazy_initialization(key_states, value_states)
            for buffer, states in ((self.keys, key_states), (self.values, value_states)):
                packed = states
                if plan.order is not None:
                    packed = states.transpose(1, 2)[plan.rows, plan.order].transpose(1, 2)
                buffer[:, :, : packed.shape[2]] = packed
            return key_states, value_states
        self.grow()
        attended = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(plan, Step):
                buffer[plan.rows, :, plan.slots] = states[:, :, 0]
                attended.append(buffer[:, :, : plan.bound])
            else:
                attended.append(torch.cat([buffer[:, :, : plan.bound], states], dim=2))
                buffer[plan.rows, :, plan.slots] = states[plan.rows, :, plan.columns]
        return attended[0], attended[1]

    def grow(self) -> None:
        """Make the buffers as large as the track's capacity where they are smaller."""
        capacity = self.track.capacity
        if capacity > self.keys.shape[2]:
            self.keys, self.values = grown(self.keys, capacity), grown(self.values, capacity)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file holds: the slots in use, not the reserved space that the strides tell of."""
        state = dict(vars(self))
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                held, whole = value.detach(), value.untyped_storage().nbytes()  # no copies of a graph either
                state[name] = (
                    held.clone(memory_format=torch.contiguous_format) if whole > held.nbytes else held
                )
        return state

    def tensors(self) -> list[torch.Tensor]:
        """Return what the layer holds its tokens in."""
        return [self.keys, self.values] if self.is_initialized else []

    def index(self, rows: torch.Tensor) -> None:
        """Replace the samples by `rows` int64 [B'] of the present ones."""
        if self.is_initialized:
            in_place = self.track.in_place
            self.keys, self.values = chosen(self.keys, rows, in_place), chosen(self.values, rows, in_place)

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.track.bound + query_length, 0

    def get_seq_length(self) -> int:
        """Return the slots in use by the longest sample (an upper bound on devices other than the CPU)."""
        return self.track.bound

    def get_max_length(self) -> int:
        """Return -1, which stands for no limit."""
        return -1


class SparseContextCache(Cache):
    """KV cache of a Dynamic-LLaVA model; `generate()` makes one by itself.

    `splits` are the layers, of `num_layers`, from which on other tokens are held than before, in order: the gates inside the model.
    Each begins a track. Buffers grow by `growth_step` slots. `static`: see the module's text.
    """

    observes = False  # whether it ranks what it holds by attention, and so has to see queries and keys
    fed: torch.Tensor | None
    offset: torch.Tensor | None
    moved_up: torch.Tensor | None
    images_kept: torch.Tensor | None

    def __init__(
        self, num_layers: int, splits: Sequence[int], growth_step: int | None = None, static: bool = False
    ) -> None:
        track = StaticTrack if static else ContextTrack
        growth_step = growth_step or (STATIC_GROWTH_STEP if static else GROWTH_STEP)
        self.splits = tuple(splits)
        self.tracks = [track(growth_step) for _ in range(len(self.splits) + 1)]
        self.static = static
        self.rule: object = None  # by which tokens leave a track later; None: they don't
        self._forget()
        super().__init__(
            layers=[RaggedLayer(self.tracks[bisect_right(self.splits, i)]) for i in range(num_layers)]
        )

    def _forget(self) -> None:
        # Columns processed, padding included: what generate() slices its inputs by. Of them, int64 [B, 1], the real tokens.
        self.seen, self.fed = 0, None
        # int64 [B, 1]: the next position id less `fed` where images count otherwise; by how much it is less for image tokens that
        # never entered the LLM; [B] image tokens behind the policy's decision.
        self.offset, self.moved_up, self.images_kept = None, None, None
        self._output_keep: list[torch.Tensor] = []

    def start(self) -> None:
        """Begin a call. On the CPU, where reading costs nothing, every track's lengths are read at once."""
        lengths = [track.lengths for track in self.tracks]
        if lengths[0] is None or lengths[0].device.type != "cpu" or self.static:
            return
        for track, held in zip(self.tracks, torch.stack(lengths).tolist(), strict=True):  # type: ignore[arg-type]
            track.held = held

    def move_up(self, count: torch.Tensor) -> None:
        """Later tokens have position ids less by `count` int64 [B, 1]: so many image tokens never entered the LLM."""
        self.moved_up = count if self.moved_up is None else self.moved_up + count

    def commit(
        self, valid: torch.Tensor, output_keep: torch.Tensor | None, image_keep: torch.Tensor | None = None
    ) -> None:
        """End a forward call over the columns of `valid` bool [B, L], False on padding; its decisions are as in `note`."""
        for track in self.tracks:
            track.commit()
        count = valid.sum(1, keepdim=True)
        self.fed = count if self.fed is None else self.fed.add_(count) if self.static else self.fed + count
        self.note(valid.shape[1], output_keep, image_keep)

    def next_positions(self) -> torch.Tensor:
        """Return int64 [B, 1], the position id of each sample's next token, as if all image tokens had entered."""
        assert self.fed is not None
        return self.fed if self.offset is None else self.fed + self.offset

    def note(
        self, columns: int, output_keep: torch.Tensor | None, image_keep: torch.Tensor | None = None
    ) -> None:
        """Take note, on the host, of a call's columns and decisions on output (bool [B, q]) and image tokens ([B, N_img])."""
        self.seen += columns
        if output_keep is not None:
            self._output_keep.append(output_keep)
        if image_keep is not None:
            kept = image_keep.sum(1)
            self.images_kept = kept if self.images_kept is None else self.images_kept + kept

    def reserve_step(self) -> None:
        """Make room for one more token in a static cache; before a step, outside any graph."""
        if any([track.reserve_step() for track in self.static_tracks()]):
            for layer in self.layers:
                layer.grow()

    def static_tracks(self) -> list[StaticTrack]:
        """Return the tracks of a static cache."""
        return [track for track in self.tracks if isinstance(track, StaticTrack)]

    def step_slots(self, layer_idx: int) -> torch.Tensor | None:
        """Return int64 [B], where a layer's new tokens lie during a single-token step; None during any other call."""
        plan = self.layers[layer_idx].track.plan
        return plan.slots if isinstance(plan, Step) else None

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that a decode step reads and writes."""
        buffers = [tensor for layer in self.layers for tensor in layer.tensors()]
        held = [track.lengths for track in self.tracks] + [self.fed]
        return [length for length in held if length is not None] + buffers

    def addresses(self) -> tuple[tuple[int, torch.Size], ...]:
        """Return where `tensors` lie, and their shapes; another answer ends a captured step's life."""
        return tuple((tensor.data_ptr(), tensor.shape) for tensor in self.tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns processed so far, padding included; `kept_lengths` tells what is held."""
        return self.seen

    def kept_lengths(self) -> torch.Tensor:
        """Return int64 [L, B], the tokens held per layer and sample."""
        if self.fed is None:
            return torch.zeros(len(self.layers), 0, dtype=torch.int64)
        return torch.stack([layer.track.lengths for layer in self.layers])

    def output_keep(self) -> torch.Tensor | None:
        """Return bool [B, T], the decision on each output token fed so far, in order; None before the first."""
        return torch.cat(self._output_keep, dim=1) if self._output_keep else None

    def num_bytes(self) -> int:
        """Return the bytes allocated for keys and values, and what ranks them."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sample b continue from sample `beam_idx[b]` int64, as in beam search."""
        for part in (*self.tracks, *self.layers):
            part.index(beam_idx)
        self._output_keep = [chosen(keep, beam_idx) for keep in self._output_keep]
        for name in ("fed", "offset", "moved_up", "images_kept"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, chosen(value, beam_idx, self.static and name == "fed"))

    batch_select_indices = reorder_cache  # keeps these samples only

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each sample become `repeats` samples in a row."""
        if self.fed is not None:
            rows = torch.arange(self.fed.shape[0], device=self.fed.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, to serve another prompt."""
        for layer in self.layers:
            layer.reset()
        for track in self.tracks:
            track.reset()
        self._forget()

    def crop(self, *args: int, **kwargs: int) -> None:
        """Raise NotImplementedError: a skipped token is gone, so an earlier state can't be restored."""
        raise NotImplementedError(
            "SparseContextCache can't be cropped (skipped tokens are gone); don't use assisted decoding with it"
        )


def zeros(like: torch.Tensor, slots: int) -> torch.Tensor:
    """Return a zero buffer [B, H, slots, D] with the batch, heads, width, dtype and device of `like` [B, H, any, D]."""
    batch, heads, _, width = like.shape
    reserved = _reserved(like, (batch, heads, slots + RESERVE, width)) if like.device.type == "cpu" else None
    # Zeros, because an unused slot's weight of 0 times a stray NaN would still be NaN.
    return like.new_zeros(batch, heads, slots, width) if reserved is None else reserved[:, :, :slots]


def grown(buffer: torch.Tensor, slots: int) -> torch.Tensor:
    """Return `buffer`, made by `zeros` or contiguous, with `slots` slots: the same memory where there is room behind each row."""
    batch, heads, held, width = buffer.shape
    if slots <= buffer.stride(1) // width:
        return buffer.as_strided((batch, heads, slots, width), buffer.stride())
    larger = zeros(buffer, slots)
    larger[:, :, :held] = buffer
    return larger


def _reserved(like: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor | None:
    """Zeros in address space of their own; None where the system gives none."""
    size = torch.Size(shape).numel()
    if not hasattr(mmap, "MAP_ANONYMOUS") or not size:
        return None
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        space = mmap.mmap(-1, size * like.element_size(), flags=flags)
    except (OSError, ValueError):
        return None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        try:
            space.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would be given whole for its first slot
        except OSError:
            pass
    return torch.frombuffer(space, dtype=like.dtype).view(shape)
