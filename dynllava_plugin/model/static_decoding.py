"""Decode steps of one shape as CUDA graphs or through `torch.compile`.

A `StaticCache` is a `SparseContextCache` that decides how a step runs. On CUDA a step is captured as a graph and replayed until
a buffer has to grow; elsewhere it runs as it is. With `compile_options` it goes through `torch.compile` first, whose mode
"reduce-overhead" does the capturing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dynllava_plugin.model.attention import SparseCall, additive, use_sparse_attention
from dynllava_plugin.model.gate import Tokens, decide, segment_ends
from dynllava_plugin.policies import Policy, TokenLayout
from dynllava_plugin.sparsity.cache import SparseContextCache

CAPTURE_THEMSELVES = ("reduce-overhead", "max-autotune")  # torch.compile's modes with CUDA graphs
# the cache, int64 [B, 1] tokens, bool [B, 1] False on padding, int64 [B, 1] or [3, B, 1] positions, int64 [B, 1] places in the text
# -> logits [B, 1, V], bool [B, 1] decisions
Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class StaticCache(SparseContextCache):
    """A KV cache whose single-token steps can be captured, and compiled where there are `compile_options` of `torch.compile`."""

    def __init__(
        self,
        num_layers: int,
        splits: Sequence[int],
        growth_step: int | None = None,
        compile_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(num_layers, splits, growth_step, static=True)
        self.compile_options = compile_options
        self.captures = (compile_options or {}).get("mode") not in CAPTURE_THEMSELVES
        self._step: Step | None = None
        self._settings: Any = None
        self._graph: tuple[Graph, Any] | None = None  # and the tensors it was captured over

    def is_step(self, input_ids: torch.Tensor | None, prompt_length: int | None) -> bool:
        """Return whether a call is one output token a sample; any other call goes the common way."""
        one = input_ids is not None and input_ids.shape[1] == 1 and self.seen > 0
        return one and (prompt_length is None or prompt_length <= self.seen)

    @torch.no_grad()
    def run(self, step: Step, settings: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of `step(self, *inputs)`, which may be captured: it must be the same for equal `settings`."""
        if self._step is None or self._settings != settings:
            self._step = step if self.compile_options is None else torch.compile(step, **self.compile_options)
            self._settings, self._graph = settings, None
        self.reserve_step()
        if self.captures and captures(inputs[0].device):
            over = inputs[0].shape, self.addresses()
            if self._graph is None or self._graph[1] != over:
                self._graph = None  # its memory is free again before the next capture
                # What a trial step wrote lies behind the lengths again.
                lengths = [self.fed, *(track.lengths for track in self.tracks)]
                graph = Graph(partial(self._step, self), inputs, [x for x in lengths if x is not None])
                self._graph = graph, over
            logits, keep = self._graph[0].replay(inputs)
        else:
            if self.compile_options is not None:
                self._pin_addresses()
            logits, keep = self._step(self, *inputs)
        logits, keep = logits.clone(), keep.clone()  # a graph writes the next step's over them
        self.note(1, keep)
        return logits, keep

    def adopt(
        self,
        fed: torch.Tensor,
        lengths: Sequence[torch.Tensor],
        bounds: Sequence[int],
        states: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Hold copies of a prefill's keys and values, computed elsewhere.

        `fed` int64 [B, 1] are the real tokens of each sample; of each track the slots 0..`lengths` - 1 are held, int64 [B], at most
        `bounds`; `states` are keys and values [B', H_kv, n, D] of each layer, of B samples or more.
        """
        batch = len(fed)
        for track, held, bound in zip(self.static_tracks(), lengths, bounds, strict=True):
            track.hold(held[:batch].clone(), bound)
        here, there = [], []
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer.lazy_initialization(keys[:batch], values[:batch])
            bound = layer.track.bound
            here += [layer.keys[:, :, :bound], layer.values[:, :, :bound]]
            there += [keys[:batch, :, :bound], values[:batch, :, :bound]]
        torch._foreach_copy_(here, there)
        self.fed = fed

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file holds; a captured or compiled step belongs to the buffers it was made over."""
        return {**vars(self), "_step": None, "_settings": None, "_graph": None}

    def _pin_addresses(self) -> None:
        """Tell `torch.compile` that the buffers it writes stay where they are, as its own graphs ask for."""
        for tensor in self.tensors():
            torch._dynamo.mark_static_address(tensor)


class Graph:
    """A call captured on CUDA, to be replayed on other values of its inputs.

    `call` takes tensors to a tuple of tensors, in operations of fixed shape that never wait for the device. The graph has its own
    copies of `inputs`; `undo` are tensors that the call changes in place and trial runs before the capture must not.
    """

    def __init__(
        self, call: Callable[..., tuple[Any, ...]], inputs: tuple[Any, ...], undo: Sequence[torch.Tensor] = ()
    ) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        before = [tensor.clone() for tensor in undo]
        self.device = inputs[0].device
        with torch.cuda.device(self.device):  # a capture is of the current device's streams
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries set themselves up, which a capture may not do
                    call(*self.inputs)
                    for tensor, value in zip(undo, before, strict=True):
                        tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.outputs = call(*self.inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """Return the captured call's outputs for other values; the next replay writes over them."""
        with torch.cuda.device(self.device):
            for static, given in zip(self.inputs, inputs, strict=True):
                static.copy_(given)
            self.graph.replay()
        return self.outputs


def captures(device: torch.device) -> bool:
    """Return whether calls of one shape are captured there."""
    return device.type == "cuda"


def static_step(
    llm: Any,
    inputs_embeds: torch.Tensor,
    valid: torch.Tensor,
    position_ids: torch.Tensor,
    text_positions: torch.Tensor,
    cache: SparseContextCache,
    policy: Policy,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what the decoder's `forward` does for one output token a sample behind a static cache, in operations of fixed shape alone.

    It takes `inputs_embeds` [B, 1, d], `valid` bool [B, 1] (False on padding), `position_ids` int64 [B, 1] or [3, B, 1],
    `text_positions` int64 [B, 1] and the decoder's `policy`, which is looked up outside what is compiled; it returns hidden states
    [B, 1, d] and bool [B, 1], which tokens stay as context.
    """
    use_sparse_attention(llm.config)
    layout, call = TokenLayout(output_mask=valid), SparseCall(cache)
    tokens = Tokens(inputs_embeds, position_ids, text_positions, valid, valid, None, None, layout)
    rotary = llm.rotary_emb(inputs_embeds, position_ids=position_ids)
    ends, stays = segment_ends(policy, len(llm.layers)), valid
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        if start < end:
            track: Any = cache.layers[start].track
            mask = additive(track.begin_static(tokens.keep), tokens.hidden)
            tokens = llm._run(start, end, tokens, mask, rotary, call)
        if policy.asks_output(end):
            decision = decide(policy, llm._view(end, tokens, None), tokens.keep, None)
            tokens, stays = replace(tokens, keep=decision.keep), decision.keep
    for track in cache.static_tracks():
        track.commit_static()
    cache.fed.add_(valid)  # type: ignore[union-attr]
    return llm.norm(tokens.hidden), stays
