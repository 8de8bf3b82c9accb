"""A stock text model's layers in segments, with a gate between each two: `SparseDecoder`, a mixin of every family's LLM."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.attention import (
    SparseCall,
    WatchedRows,
    additive,
    context_mask,
    use_sparse_attention,
)
from dynllava_plugin.model.configuration import check_layers
from dynllava_plugin.model.gate import (
    Tokens,
    by_input_columns,
    decide,
    last_column,
    present_tokens,
    segment_ends,
    whole,
)
from dynllava_plugin.model.outputs import Decision, SparseDecoderOutput, TrainingMasks
from dynllava_plugin.model.token_layout import position_offset, read_layout, valid_columns
from dynllava_plugin.model.training import mask_images, mask_texts
from dynllava_plugin.policies import Gate, Policy, TokenLayout, policy_of
from dynllava_plugin.sparsity.cache import CACHE_NAME, SparseContextCache
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.masked_softmax import training_context
from dynllava_plugin.sparsity.selection import ImagePredictor, TextPredictor

PREDICTORS = re.compile(r"^model\.language_model\.(text_predictor|prompt_predictor|image_predictor(_\d+)?)\.")
# What a caller asked for in this thread (or task), by the decoder's identity: a call may run another model inside.
_OF_CALL: ContextVar[dict[int, SparsityConfig] | None] = ContextVar("sparsity_of_this_call", default=None)


class SparseDecoder(nn.Module):
    """To stand before a stock text model in a class's bases: its layers, unchanged, over fewer and fewer tokens.

    What a subclass needs is the stock class and a config with `sparsity`. Image and text predictor are added to its modules.
    """

    # Of the stock text model.
    config: Any
    layers: nn.ModuleList
    embed_tokens: nn.Module
    norm: nn.Module
    rotary_emb: nn.Module

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_layers(config)
        size, sparsity = config.hidden_size, config.sparsity
        self.image_predictor = ImagePredictor(size, sparsity)
        self.text_predictor = TextPredictor(size, sparsity) if sparsity.text_predictor else None
        self.prompt_predictor = TextPredictor(size, sparsity) if sparsity.prompt_predictor else None
        for layer, _ in sparsity.later_gates:
            setattr(self, f"image_predictor_{layer}", ImagePredictor(size, sparsity))
        self._policy: tuple[SparsityConfig, Policy] | None = None  # and the settings it was made of
        self.post_init()  # type: ignore[operator]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SparseContextCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        tokens: Tokens | None = None,
        last_only: bool = False,
        cache: SparseContextCache | None = None,
        **kwargs: Any,
    ) -> SparseDecoderOutput:
        """Run a segment, ask its gate, pack what goes on, until the layers are through; return what is left at inference.

        The `tokens` are those of `SparseVLM`, or, all of them prompt text, `inputs_embeds` [B, L, d] or `input_ids` int64 [B, L];
        `attention_mask` [B, seen + L] is 0 on padding, at either end, and covers the cached columns too; `position_ids` int64 are
        [B or 1, L], [3, B, L] on three axes, or [4, B, L] with places in the text first. With `last_only` the last token's hidden
        state alone is wanted, so that dropped output tokens need not be computed at all.
        """
        use_sparse_attention(self.config)
        policy = self.policy
        cache = self._cache_for(past_key_values if cache is None else cache, use_cache, policy)
        seen = cache.seen if cache is not None else 0
        if tokens is None:
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            valid = valid_columns(attention_mask, len(embeds), embeds.shape[1], seen, embeds.device)
            layout = read_layout(valid, None, None, (None, 0), policy, False)
            tokens = Tokens.of(embeds, attention_mask, position_ids, valid, cache, layout)
        valid, layout = tokens.valid, tokens.layout
        batch, length = valid.shape
        step = seen > 0 and length == 1
        if cache is not None:
            cache.start()
            if tokens.position_ids is not tokens.text_positions and not step:
                cache.offset = position_offset(tokens.position_ids, valid, cache)
            if cache.moved_up is not None:
                tokens = tokens.behind(cache.moved_up)
        if policy.attention_layers and layout.image_lengths:
            layout = replace(layout, watched=policy.image.watched(self._view(0, tokens, None)))  # type: ignore[union-attr]
            tokens = replace(tokens, layout=layout)
        decisions: list[Decision] = []
        call = SparseCall(cache)
        rotary = None
        ends = segment_ends(policy, len(self.layers))
        for index, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            watch = WatchedRows.of(policy.attention_layers, start, end, tokens.valid, tokens.layout)
            if start < end:
                call.watch = watch
                mask = self._mask(tokens, cache, start, seen, last_only)
                if rotary is None:
                    rotary = self.rotary_emb(tokens.hidden, position_ids=tokens.position_ids)
                tokens = self._run(start, end, tokens, mask, rotary, call)
            if end == len(self.layers):
                break
            if end not in policy.layers or (step and not policy.asks_output(end)):
                continue
            before = tokens
            attention = None if watch is None else watch.weights
            tokens, decision = self._gate(
                policy, end, tokens, attention, cache, last_only, step, index + 2 < len(ends)
            )
            rotary = rotary if tokens.position_ids is before.position_ids else None
            decisions.append(by_input_columns(decision, before, layout, length))
        if last_only and not step and not tokens.layout.ends_real:
            tokens = tokens.packed(last_column(tokens.valid), [1] * batch, False)
        decision = whole(decisions, valid, layout)
        if cache is not None:
            cache.commit(valid, decision.text_keep, decision.image_keep)
        return SparseDecoderOutput(
            last_hidden_state=self.norm(tokens.hidden),
            token_index=tokens.token_index,
            decision=decision,
            **{CACHE_NAME: cache},
        )

    def forward_training(
        self,
        tokens: Tokens,
        tau: float,
        gumbel_noise: tuple[torch.Tensor | None, ...],
        keep_rates: torch.Tensor | None,
    ) -> SparseDecoderOutput:
        """Run all tokens through all layers; from layer l on under Gumbel masks (section 3.3.3), fewer behind each later gate."""
        use_sparse_attention(self.config)
        valid = tokens.valid
        # Behind the last real token padding needs no mask: the causal order hides it, and flash attention takes none.
        behind = bool((valid[:, :-1] >= valid[:, 1:]).all())
        causal = None
        if not behind or "eager" in self.config._attn_implementation:
            seen = torch.ones_like(valid) if behind else valid
            causal = context_mask(self.config, seen, None, tokens.hidden)
        rotary = self.rotary_emb(tokens.hidden, position_ids=tokens.position_ids)
        layers, settings = len(self.layers), self.config.sparsity
        masks = TrainingMasks(torch.ones_like(valid, dtype=torch.float32), tau)
        image_noise, text_noise, prompt_noise = (*gumbel_noise, None)[:3]
        share: float | torch.Tensor = 1.0
        start, call = 0, SparseCall()
        for index, (layer, rate) in enumerate(() if settings.mode == "full" else settings.image_gates):
            tokens = self._run(start, layer, tokens, causal if not start else None, rotary, call)
            share = share * (rate if index or keep_rates is None else keep_rates)
            noise = None if image_noise is None else image_noise[..., 2 * index : 2 * index + 2]
            gate = self._view(layer, tokens, None)
            mask_images(masks, gate, share, noise)
            if not index:
                mask_texts(masks, gate, settings, text_noise, prompt_noise)
            start, call = layer, SparseCall(context=training_context(masks.keep, valid))
        tokens = self._run(start, layers, tokens, causal if not start else None, rotary, call)
        return SparseDecoderOutput(last_hidden_state=self.norm(tokens.hidden), masks=masks)

    @property
    def policy(self) -> Policy:
        """Return who decides what stays: by the settings of this call (`settings_of_call`), else the model's."""
        settings = (_OF_CALL.get() or {}).get(id(self)) or self.config.sparsity
        held = self._policy
        if held is None or held[0] != settings:
            held = self._policy = copy.deepcopy(settings), policy_of(settings).of_depth(len(self.layers))
        return held[1]

    @contextmanager
    def settings_of_call(self, settings: SparsityConfig) -> Iterator[None]:
        """Run under `settings` in this thread (or task) until the block ends, whatever other threads set meanwhile."""
        token = _OF_CALL.set({**(_OF_CALL.get() or {}), id(self): settings})
        try:
            yield
        finally:
            _OF_CALL.reset(token)

    def _gate(
        self,
        policy: Policy,
        layer: int,
        tokens: Tokens,
        attention: torch.Tensor | None,
        cache: SparseContextCache | None,
        last_only: bool,
        step: bool,
        another: bool,
    ) -> tuple[Tokens, Decision]:
        """Ask the policy at the input of `layer`; return what goes on and the decision."""
        decision = decide(policy, self._view(layer, tokens, attention), tokens.keep, tokens.keep_counts)
        if step:  # one token a sample: it goes on, whether or not it stays as context
            return replace(
                tokens, keep=decision.keep, layout=tokens.layout if another else TokenLayout()
            ), decision
        if decision.image_states is not None:
            hidden = tokens.hidden.clone()
            hidden.view(-1, hidden.shape[-1])[tokens.layout.image_index] = decision.image_states.to(hidden)
            tokens = replace(tokens, hidden=hidden)
        present, counts = present_tokens(decision, tokens, last_only)
        if counts is None:
            counts = present.sum(1).tolist()
        # Images that turn on three axes keep their places: behind one, positions go on from its longer side, not its tokens.
        counted = tokens.position_ids is tokens.text_positions
        if layer == 0 and policy.packed_positions and counted and tokens.layout.image_lengths:
            gone = tokens.valid & ~decision.keep
            tokens = tokens.behind(gone.cumsum(1))
            if cache is not None:
                cache.move_up(gone.sum(1, keepdim=True))
        if sum(counts) == sum(tokens.counts or ()) and (not last_only or tokens.layout.ends_real):
            return replace(tokens, keep=decision.keep), decision
        all_stay = present is decision.keep
        tokens = replace(tokens, keep=tokens.valid if all_stay else decision.keep)
        return tokens.packed(present, counts, another), decision

    def _view(self, layer: int, tokens: Tokens, attention: torch.Tensor | None) -> Gate:
        positions = tokens.text_positions.expand(tokens.valid.shape)
        # A later gate has its own.
        predictor = getattr(self, f"image_predictor_{layer}", self.image_predictor)
        return Gate(
            tokens.hidden, tokens.valid, positions, tokens.layout, predictor, self.text_predictor,
            attention, layer, tokens.entered, self.prompt_predictor,
        )  # fmt: skip

    def _mask(
        self, tokens: Tokens, cache: SparseContextCache | None, start: int, seen: int, last_only: bool
    ) -> torch.Tensor | None:
        """Plan where the segment's keys go; return what its tokens may see, as the implementation wants it."""
        cached = None
        if cache is not None:
            cached = cache.layers[start].track.begin(tokens.keep, tokens.keep_counts)
        if not seen:
            if last_only:  # every other token that is dropped has gone: the causal order says it all
                return context_mask(self.config, tokens.valid, tokens.counts, tokens.hidden)
            return context_mask(self.config, tokens.keep, tokens.keep_counts, tokens.hidden)
        # SDPA would turn a step's mask into an additive one in every layer.
        step = tokens.hidden.shape[1] == 1 or "eager" in self.config._attn_implementation
        return additive(cached, tokens.hidden) if cached is not None and step else cached

    def _run(
        self, start: int, end: int, tokens: Tokens, mask: torch.Tensor | None, rotary: Any, call: SparseCall
    ) -> Tokens:
        """Layers start..end - 1 over the present tokens."""
        hidden, deepstack, entered = tokens.hidden, tokens.deepstack, tokens.entered
        for layer in self.layers[start:end]:
            entered = hidden
            hidden = layer(
                hidden, attention_mask=mask, position_ids=None, position_embeddings=rotary,
                sparse=call, **{CACHE_NAME: call.cache},
            )  # fmt: skip
            if deepstack:
                hidden, deepstack = hidden + deepstack[0], deepstack[1:]
        return replace(tokens, hidden=hidden, deepstack=deepstack, entered=entered)

    def _cache_for(self, cache: Any, use_cache: bool | None, policy: Policy) -> SparseContextCache | None:
        if cache is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            if not wanted and policy.sequential:
                raise UserError(f"use_cache: {policy.name} decides what leaves the KV cache, so it needs one")
            return policy.new_cache(self.config.num_hidden_layers) if wanted and not self.training else None
        self.check_cache(cache, policy)
        return cache

    @staticmethod
    def check_cache(cache: Any, policy: Policy) -> None:
        """Raise `UserError` for a cache of another kind or made under another policy."""
        if not isinstance(cache, SparseContextCache):
            raise UserError(
                f"past_key_values: {type(cache).__name__} can't hold a different context per layer; pass none, or model.new_cache()"
            )
        if cache.rule != policy.cache_rule or cache.splits != policy.splits:
            made = ", ".join(map(str, cache.splits)) or "no layer"
            gates = ", ".join(map(str, policy.splits)) or "none"
            raise UserError(
                f"past_key_values: made for another policy than {policy.name} (its context changes at {made}, "
                f"{policy.name}'s at {gates}); start a new one"
            )
