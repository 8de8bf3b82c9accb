"""Prefill in shapes that a bucket fixes, captured on CUDA and replayed.

A prompt's operations depend on how long it is. So prompts are padded to the next bucket of lengths and batches, with the padding
behind them, where the causal order hides it: no layer needs a mask. What stays of each image is a number known beforehand, so
every later segment has one shape, too. A bucket that comes a second time is captured, over buffers of its own, and what it leaves
is copied into the call's cache. Elsewhere than on CUDA a static cache's prefill runs the same operations uncaptured.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from dynllava_plugin.environment import free_bytes
from dynllava_plugin.errors import one_line
from dynllava_plugin.model.attention import SparseCall, WatchedRows, context_mask, use_sparse_attention
from dynllava_plugin.model.gate import Tokens, decide, segment_ends
from dynllava_plugin.model.outputs import Decision, SparseDecoderOutput
from dynllava_plugin.model.static_decoding import Graph, StaticCache, captures
from dynllava_plugin.model.token_layout import position_offset
from dynllava_plugin.policies import Policy, TokenLayout
from dynllava_plugin.sparsity.cache import CACHE_NAME, SparseContextCache
from dynllava_plugin.sparsity.selection import pick
from dynllava_plugin.sparsity.tracks import packing_order

HELD = 8  # graphs at once
SHARE = 0.5  # of the free memory that a graph may take: the call's own cache comes beside it
CAPTURES = 64  # in a model's life; a run whose prompts are of ever other lengths goes on without
# Buckets between a power of two and the next: at most a sixteenth of the tokens is padding, an eighth of the rows.
LENGTHS, BATCHES = 16, 8


class Bucket(NamedTuple):
    """What fixes a prefill's shapes: rows, columns of each, images of each and tokens of each image."""

    batch: int
    length: int
    images: int
    image_tokens: int

    def __str__(self) -> str:
        return f"prefill of {self.batch} x {self.length} tokens"


def bucket(count: int, between: int) -> int:
    """Return the least bucket that holds `count`, of `between` ones from a power of two to the next."""
    step = max(1, (1 << (count.bit_length() - 1)) // between)
    return -(-count // step) * step


class StaticPrefill:
    """A model's captured prefills: how many were `captured` and `replayed`, and why how many went the common way (`plain`)."""

    def __init__(self) -> None:
        self.captured, self.replayed, self.plain = 0, 0, Counter[str]()
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._weights: tuple[int, ...] = ()
        self._met: set[Any] = set()
        self._refused: set[Any] = set()
        self._lock = Lock()  # a graph's buffers serve one call at a time

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model begins anew: graphs belong to the weights they were captured over."""
        return StaticPrefill, ()

    @torch.no_grad()
    def run(self, llm: Any, policy: Policy, tokens: Tokens, cache: StaticCache) -> SparseDecoderOutput | None:
        """Prefill an empty `cache`, and return the last tokens' hidden states [B, 1, d]; None where the call has to go the common way.

        `tokens` are as they enter the decoder `llm`, padded at either end.
        """
        counts = tokens.counts
        assert counts is not None
        per_row = _images_of_each_row(tokens.layout, len(counts))
        reason = _why_not(policy, tokens, per_row)
        if reason:
            self.plain[reason] += 1
            return None
        assert per_row is not None
        images, each = per_row
        to = Bucket(bucket(len(counts), BATCHES), bucket(max(counts), LENGTHS), images, each)
        inputs = _aligned(tokens, counts, to)
        device = tokens.hidden.device

        def call(*given: torch.Tensor) -> tuple[Any, ...]:
            buffers = StaticCache(len(llm.layers), policy.splits)
            found = prefill_in_shape(llm, _tokens(given, to), given[2], buffers, policy)
            return *found, buffers

        with self._lock:
            if captures(device):
                kind = to, policy, llm.config._attn_implementation, inputs[0].dtype, len(inputs)
                graph = self._graph(kind, llm, call, inputs, to)
                if graph is None:
                    return None
                self.replayed += 1
                last, image_keep, image_score, buffers = graph.replay(inputs)
            else:
                last, image_keep, image_score, buffers = call(*inputs)
            rows = len(counts)
            states = [(layer.keys, layer.values) for layer in buffers.layers]
            lost = [to.length - track.bound for track in buffers.tracks]
            bounds = [max(counts) - gone for gone in lost]
            fed = tokens.valid.sum(1, keepdim=True)
            if tokens.position_ids is not tokens.text_positions:
                cache.offset = position_offset(tokens.position_ids, tokens.valid, None)
            cache.adopt(fed, [track.lengths for track in buffers.tracks], bounds, states)
            last, image_keep, image_score = (
                None if found is None else found[:rows].clone() for found in (last, image_keep, image_score)
            )
        cache.note(tokens.valid.shape[1], None, image_keep)
        index = tokens.token_index.amax(1, keepdim=True)
        decision = Decision(tokens.valid, image_keep=image_keep, image_score=image_score)
        return SparseDecoderOutput(
            last_hidden_state=last, token_index=index, decision=decision, **{CACHE_NAME: cache}
        )

    def _graph(
        self, key: Any, llm: Any, call: Any, inputs: tuple[torch.Tensor, ...], to: Bucket
    ) -> Graph | None:
        """Return a bucket's graph, captured when the bucket comes a second time; None where there is none."""
        weights = tuple(parameter.data_ptr() for parameter in llm.parameters())
        if weights != self._weights:  # loaded anew, moved, an adapter put in
            self._weights = weights
            self._graphs.clear()
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key in self._refused:
            self.plain["bucket can't be captured"] += 1
            return None
        if key not in self._met:
            self._met.add(key)
            self.plain["a bucket's first prompt"] += 1
            return None
        reason = _not_plain(llm)
        if self.captured >= CAPTURES:
            reason = f"{CAPTURES} buckets were captured already"
        needed = prefill_bytes(llm.config, to.batch, to.length, inputs[0].element_size())
        free = free_bytes(inputs[0].device)
        if needed > SHARE * free:
            reason = f"its graph needs about {needed / 2**30:.2f} of {free / 2**30:.2f} GiB free"
        if not reason:
            if len(self._graphs) >= HELD:
                self._graphs.popitem(last=False)
            try:
                with torch.inference_mode(False):  # its buffers are written again by calls of any kind
                    self._graphs[key] = Graph(call, inputs)
                self.captured += 1
                return self._graphs[key]
            except RuntimeError as error:  # out of memory, or an operation that no capture takes
                reason = one_line(error)
        self._refused.add(key)
        self.plain["bucket can't be captured"] += 1
        print(f"{to}: {reason}; it runs uncaptured", file=sys.stderr)
        return None


def prefill_bytes(config: Any, batch: int, length: int, itemsize: int) -> int:
    """Return about how many bytes a prefill of `batch` x `length` tokens holds: all keys and values, one layer's activations."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    held = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    return batch * length * itemsize * (held + 6 * config.hidden_size + 3 * config.intermediate_size)


def _images_of_each_row(layout: TokenLayout, batch: int) -> tuple[int, int] | None:
    """(images, tokens of each) that every sample has; None where samples differ."""
    if not layout.image_lengths:
        return 0, 0
    each, images = set(layout.image_lengths), len(layout.image_lengths) // batch
    rows = tuple(row for row in range(batch) for _ in range(images))
    return (images, each.pop()) if len(each) == 1 and layout.image_rows == rows else None


def _why_not(policy: Policy, tokens: Tokens, per_row: Any) -> str:
    if not policy.static_prefill:
        return f"{policy.name}'s gates"
    if tokens.layout.output_mask is not None:
        return "output text in the prompt"
    if per_row is None:
        return "images that differ from sample to sample"
    return "autocast" if torch.is_autocast_enabled(tokens.hidden.device.type) else ""


def _not_plain(llm: Any) -> str:
    """Why what the modules do may change behind a graph's back; empty where it can't."""
    for module in llm.modules():
        adapter = type(module).__module__.startswith("peft.")
        if adapter or hasattr(module, "_hf_hook") or module._forward_hooks:
            return f"{type(module).__name__} has an adapter or a hook"
    devices = {parameter.device for parameter in llm.parameters()}
    return "" if len(devices) == 1 else "the layers are on several devices"


def _aligned(tokens: Tokens, counts: Sequence[int], to: Bucket) -> tuple[torch.Tensor, ...]:
    """Return states [B, L, d], image places int64 [T], lengths int64 [B], text positions and position ids, levels of deepstack.

    Padding stands behind each prompt; rows beyond the batch repeat its last one.
    """
    valid, device = tokens.valid, tokens.hidden.device
    batch, length = valid.shape
    rows = torch.arange(to.batch, device=device).clamp(max=batch - 1)
    order = torch.arange(length, device=device).expand(batch, -1)
    if min(counts) < length:
        order = packing_order(valid, max(counts))
    order = pad(order, (0, to.length - order.shape[1]))[rows]  # what stands on padding doesn't matter

    def positions(values: torch.Tensor) -> torch.Tensor:
        return values.expand(*values.shape[:-2], batch, -1)[..., rows[:, None], order]

    places = order.new_zeros(0)
    if to.images:
        columns = (valid.cumsum(1) - 1).flatten()[tokens.layout.image_index].view(batch, -1)
        places = (columns[rows] + torch.arange(to.batch, device=device)[:, None] * to.length).flatten()
    states = (values[rows[:, None], order] for values in (tokens.hidden, *tokens.deepstack))
    text, turned = positions(tokens.text_positions), positions(tokens.position_ids)
    return next(states), places, valid.sum(1)[rows], text, turned, *states


def _tokens(given: tuple[torch.Tensor, ...], to: Bucket) -> Tokens:
    """Return what `_aligned` gave as the tokens of a call."""
    hidden, places, lengths, text, turned, *levels = given
    valid = torch.arange(to.length, device=hidden.device) < lengths[:, None]
    layout = TokenLayout()
    if to.images:
        mask = torch.zeros_like(valid)
        mask.view(-1).index_fill_(0, places, True)
        layout = TokenLayout(
            image_mask=mask,
            image_lengths=(to.image_tokens,) * (to.batch * to.images),
            image_rows=tuple(row for row in range(to.batch) for _ in range(to.images)),
            image_index=places,
        )
    if turned.dim() == 2:
        turned = text
    return Tokens(hidden, turned, text, valid, valid, None, None, layout, tuple(levels))


def prefill_in_shape(
    llm: Any, tokens: Tokens, lengths: torch.Tensor, cache: SparseContextCache, policy: Policy
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Do what the decoder's `forward` does for whole prompts into an empty static cache, in operations of fixed shape.

    Padding stands behind each prompt: the causal order hides it, so that no layer needs a mask.

    `tokens` [B, L] have as many images of one size in each prompt, and no output text; `lengths` int64 [B] are the real ones, and
    `policy` allows `static_prefill`. It returns the last real token's hidden states [B, 1, d], and bool [B, N_img] image tokens
    that stay and their scores, or None.
    """
    use_sparse_attention(llm.config)
    call, decision, ends = SparseCall(cache), None, segment_ends(policy, len(llm.layers))
    batch, rotary = len(lengths), None
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        length = tokens.hidden.shape[1]
        if start < end:
            call.watch = WatchedRows.of(policy.attention_layers, start, end, tokens.valid, tokens.layout)
            track: Any = cache.layers[start].track
            track.plan_whole(lengths, length)
            mask = context_mask(llm.config, tokens.valid, [length] * batch, tokens.hidden)
            rotary = rotary or llm.rotary_emb(tokens.hidden, position_ids=tokens.position_ids)
            tokens = llm._run(start, end, tokens, mask, rotary, call)
            track.commit()
        if end not in policy.layers or not tokens.layout.image_lengths:
            continue
        watch = call.watch
        attention = watch.weights if isinstance(watch, WatchedRows) else None
        decision = decide(policy, llm._view(end, tokens, attention), tokens.valid, [length] * batch)
        assert decision.counts is not None
        lengths, rotary = decision.keep.sum(1), None
        tokens = tokens.first(packing_order(decision.keep, max(decision.counts)), lengths)
    last = pick(tokens.hidden, lengths[:, None] - 1)
    found = (None, None) if decision is None else (decision.image_keep, decision.image_score)
    return llm.norm(last), *found
