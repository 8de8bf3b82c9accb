"""A decode step and a prefill in tensor operations of fixed shape alone: what can be captured and compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dynllava_plugin.model.attention import (
    SparseCall,
    WatchedRows,
    additive,
    context_mask,
    use_sparse_attention,
)
from dynllava_plugin.model.gate import Tokens, decide, gather_columns, segment_ends
from dynllava_plugin.policies import Policy, TokenLayout
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.tracks import packing_order


class StaticCalls(nn.Module):
    """Of `SparseDecoder`: `forward` behind a static cache."""

    config: Any
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    _run: Any
    _view: Any

    def static_step(
        self,
        inputs_embeds: torch.Tensor,
        valid: torch.Tensor,
        position_ids: torch.Tensor,
        text_positions: torch.Tensor,
        cache: SparseContextCache,
        policy: Policy,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `forward` does for one output token a sample behind a static cache, in tensor operations of fixed shape alone.

        It takes `inputs_embeds` [B, 1, d], `valid` bool [B, 1] (False on padding), `position_ids` int64 [B, 1] or [3, B, 1],
        `text_positions` int64 [B, 1] and `self.policy`, which is looked up outside what is compiled; it returns hidden states [B, 1,
        d] and bool [B, 1], which tokens stay as context.
        """
        use_sparse_attention(self.config)
        layout, call = TokenLayout(output_mask=valid), SparseCall(cache)
        tokens = Tokens(inputs_embeds, position_ids, text_positions, valid, valid, None, None, layout)
        rotary = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        ends, stays = segment_ends(policy, len(self.layers)), valid
        for start, end in zip((0, *ends[:-1]), ends, strict=True):
            if start < end:
                track: Any = cache.layers[start].track
                mask = additive(track.begin_static(tokens.keep), tokens.hidden)
                tokens = self._run(start, end, tokens, mask, rotary, call)
            if policy.asks_output(end):
                decision = decide(policy, self._view(end, tokens, None), tokens.keep, None)
                tokens, stays = replace(tokens, keep=decision.keep), decision.keep
        for track in cache.static_tracks():
            track.commit_static()
        cache.fed.add_(valid)  # type: ignore[union-attr]
        return self.norm(tokens.hidden), stays

    def static_prefill(
        self, tokens: Tokens, lengths: torch.Tensor, cache: SparseContextCache, policy: Policy
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Do what `forward` does for whole prompts into an empty static cache, in tensor operations of fixed shape alone.

        Padding stands behind each prompt: the causal order hides it, so that no layer needs a mask.

        `tokens` [B, L] have as many images of one size in each prompt, and no output text; `lengths` int64 [B] are the real ones, and
        `policy` allows `static_prefill`. It returns the last real token's hidden states [B, 1, d], and bool [B, N_img] image tokens
        that stay and their scores, or None.
        """
        use_sparse_attention(self.config)
        call, decision, ends = SparseCall(cache), None, segment_ends(policy, len(self.layers))
        batch, rotary = len(lengths), None
        for start, end in zip((0, *ends[:-1]), ends, strict=True):
            length = tokens.hidden.shape[1]
            if start < end:
                call.watch = WatchedRows.of(policy.attention_layers, start, end, tokens.valid, tokens.layout)
                track: Any = cache.layers[start].track
                track.plan_whole(lengths, length)
                mask = context_mask(self.config, tokens.valid, [length] * batch, tokens.hidden)
                rotary = rotary or self.rotary_emb(tokens.hidden, position_ids=tokens.position_ids)
                tokens = self._run(start, end, tokens, mask, rotary, call)
                track.commit()
            if end not in policy.layers or not tokens.layout.image_lengths:
                continue
            watch = call.watch
            attention = watch.weights if isinstance(watch, WatchedRows) else None
            decision = decide(policy, self._view(end, tokens, attention), tokens.valid, [length] * batch)
            assert decision.counts is not None
            lengths, rotary = decision.keep.sum(1), None
            tokens = tokens.first(packing_order(decision.keep, max(decision.counts)), lengths)
        last = gather_columns(tokens.hidden, lengths[:, None] - 1)
        found = (None, None) if decision is None else (decision.image_keep, decision.image_score)
        return self.norm(last), *found
