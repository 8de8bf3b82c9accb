"""A Llama decoder with one gate at layer l."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.models.llama.modeling_llama import (
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.attention_rows import WatchLastPromptToken
from dynllava_plugin.model.configuration import DynamicLlamaConfig
from dynllava_plugin.model.gate import decide, decide_training
from dynllava_plugin.model.layers import DynamicLlamaDecoderLayer
from dynllava_plugin.model.masks import additive, context_mask
from dynllava_plugin.model.outputs import DynamicLlamaOutput
from dynllava_plugin.model.packing import (
    at_columns,
    gather_columns,
    pack_present,
    present_tokens,
    without_removed,
)
from dynllava_plugin.policies import Gate, Policy, TokenLayout, policy_of
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.masked_softmax import training_context
from dynllava_plugin.sparsity.predictors import ImagePredictor, TextPredictor


class DynamicLlamaModel(LlamaPreTrainedModel):
    """Layers 0..l-1 over every token, the gate, layers l..L-1 over the reduced context."""

    config: DynamicLlamaConfig
    config_class = DynamicLlamaConfig
    _no_split_modules = ["DynamicLlamaDecoderLayer"]
    _supports_flex_attn = False

    def __init__(self, config: DynamicLlamaConfig) -> None:
        super().__init__(config)
        config.sparsity.validate(config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DynamicLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.image_predictor = ImagePredictor(config.hidden_size, config.sparsity)
        self.text_predictor = (
            TextPredictor(config.hidden_size, config.sparsity) if config.sparsity.text_predictor else None
        )
        self.gradient_checkpointing = False
        self._policy: tuple[SparsityConfig, Policy] | None = None  # and the settings it was made of
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SparseContextCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        layout: TokenLayout | None = None,
        last_only: bool = False,
        **kwargs: Any,
    ) -> DynamicLlamaOutput:
        """Inference.

        Parameters
        ----------
        inputs_embeds : [B, L, d]
            Or `input_ids` int64 [B, L].
        attention_mask : int or bool [B, seen + L], optional
            0 on padding, at either end; covers the cached columns too.
        layout : TokenLayout, optional
            Where images and output text are; without it everything is prompt text.
        last_only : bool
            Only the last token's hidden state is wanted, so that dropped output tokens need not be computed at all.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        layout = layout or TokenLayout()
        cache = self._cache_for(past_key_values, use_cache)
        seen = cache.seen if cache is not None else 0
        batch, length, _ = inputs_embeds.shape
        valid = self._valid_columns(attention_mask, batch, length, seen, inputs_embeds.device)
        if position_ids is None:
            position_ids = self._position_ids(attention_mask, valid, cache)
        if cache is not None and cache.moved_up is not None:
            position_ids = position_ids - cache.moved_up

        policy = self.policy
        hidden, columns, given = inputs_embeds, None, layout
        if layout.removed is not None:
            hidden, position_ids, valid, layout, columns = without_removed(
                hidden, position_ids, valid, layout, cache
            )
        watch = WatchLastPromptToken.of(policy.attention_layer, valid, layout)
        mask = context_mask(
            self.config, cache.dense.begin(valid) if cache is not None else None, hidden, valid, seen
        )
        hidden = self._run(
            self.layers[: self.sparse_layer], hidden, mask, position_ids, cache, watch=watch, **kwargs
        )

        attention = None if watch is None else watch.weights
        gate = Gate(hidden, valid, position_ids, layout, self.image_predictor, self.text_predictor, attention)
        decision = decide(policy, gate)
        decision.add_removed(given)
        if columns is not None and decision.text_keep is not None:
            decision.text_keep = at_columns(decision.text_keep, columns, length)[:, given.output_start :]
        keep, present = decision.keep, present_tokens(decision, valid, layout, last_only)
        token_index, gathered = pack_present(present, valid, seen, last_only)
        if gathered:
            hidden, position_ids = (
                gather_columns(hidden, token_index),
                gather_columns(position_ids, token_index),
            )
            valid = token_index >= 0
            keep = gather_columns(keep, token_index) & valid
        if columns is not None:
            token_index = torch.where(valid, gather_columns(columns, token_index), -1)
        step_mask = cache.sparse.begin(keep) if cache is not None else None
        # With the last token alone in demand every other one here is kept: the causal order says it all.
        dropped = keep if layout.output_mask is not None and not last_only else None
        mask = context_mask(self.config, step_mask, hidden, valid, seen, dropped)
        watch = None if cache is None else cache.watch
        hidden = self._run(
            self.layers[self.sparse_layer :], hidden, mask, position_ids, cache, watch=watch, **kwargs
        )

        if cache is not None:
            cache.commit(length, decision.text_keep, decision.image_keep)
        return DynamicLlamaOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=cache,
            token_index=token_index,
            decision=decision,
        )

    def forward_training(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        layout: TokenLayout,
        tau: float,
        gumbel_noise: tuple[torch.Tensor | None, torch.Tensor | None],
        **kwargs: Any,
    ) -> DynamicLlamaOutput:
        """All tokens through all layers; from layer l on under Gumbel masks (section 3.3.3)."""
        batch, length, _ = inputs_embeds.shape
        valid = self._valid_columns(attention_mask, batch, length, 0, inputs_embeds.device)
        if position_ids is None:
            position_ids = self._position_ids(attention_mask, valid, None)
        # Behind the last real token padding needs no mask: the causal order hides it, and flash attention takes none.
        behind = bool((valid[:, :-1] >= valid[:, 1:]).all())
        causal = context_mask(
            self.config, None, inputs_embeds, torch.ones_like(valid) if behind else valid, 0
        )
        if self.config.sparsity.mode == "full":
            hidden = self._run(self.layers, inputs_embeds, causal, position_ids, None, **kwargs)
            return DynamicLlamaOutput(last_hidden_state=self.norm(hidden))
        hidden = self._run(
            self.layers[: self.sparse_layer], inputs_embeds, causal, position_ids, None, **kwargs
        )
        masks = decide_training(
            hidden, layout, self.config.sparsity, self.image_predictor, self.text_predictor, tau, gumbel_noise
        )
        context = training_context(masks.keep, valid)
        hidden = self._run(
            self.layers[self.sparse_layer :], hidden, None, position_ids, None, context=context, **kwargs
        )
        return DynamicLlamaOutput(last_hidden_state=self.norm(hidden), masks=masks)

    @property
    def sparse_layer(self) -> int:
        """l, the first layer with a reduced context."""
        return self.policy.gate_layer

    @property
    def policy(self) -> Policy:
        """Who decides what stays, by the settings in force."""
        settings = self.config.sparsity
        if self._policy is None or self._policy[0] != settings:
            self._policy = copy.deepcopy(settings), policy_of(settings)
        return self._policy[1]

    def new_cache(self) -> SparseContextCache:
        """An empty KV cache for this model."""
        return self.policy.new_cache(self.config.num_hidden_layers)

    def static_step(
        self,
        inputs_embeds: torch.Tensor,
        valid: torch.Tensor,
        position_ids: torch.Tensor,
        cache: SparseContextCache,
        policy: Policy,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` for one output token a sample behind a static cache, in tensor operations of fixed shape alone.

        Parameters
        ----------
        inputs_embeds : [B, 1, d]
        valid : bool [B, 1]
            False on padding.
        position_ids : int64 [B, 1]
        policy : Policy
            `self.policy`, looked up outside what is compiled.

        Returns
        -------
        [B, 1, d] hidden states; bool [B, 1] of the tokens that stay as context.
        """
        dense, sparse = cache.static_tracks()
        mask = additive(dense.begin_static(valid), inputs_embeds)
        hidden = self._run(self.layers[: cache.sparse_layer], inputs_embeds, mask, position_ids, cache)
        layout = TokenLayout(output_mask=valid)
        gate = Gate(hidden, valid, position_ids, layout, self.image_predictor, self.text_predictor)
        decision = decide(policy, gate)
        mask = additive(sparse.begin_static(decision.keep), hidden)
        hidden = self._run(self.layers[cache.sparse_layer :], hidden, mask, position_ids, cache)
        dense.commit_static()
        sparse.commit_static()
        return self.norm(hidden), decision.keep

    def _run(
        self,
        layers: nn.ModuleList,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: SparseContextCache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        position_embeddings = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=cache,
                **kwargs,
            )
        return hidden

    def _cache_for(self, cache: Any, use_cache: bool | None) -> SparseContextCache | None:
        policy = self.policy
        if cache is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            if not wanted and policy.sequential:
                raise UserError(f"use_cache: {policy.name} decides what leaves the KV cache, so it needs one")
            return policy.new_cache(self.config.num_hidden_layers) if wanted and not self.training else None
        self.check_cache(cache)
        return cache

    def check_cache(self, cache: Any) -> None:
        """`UserError` for a cache of another kind or made under another policy."""
        policy = self.policy
        if not isinstance(cache, SparseContextCache):
            raise UserError(
                f"past_key_values: {type(cache).__name__} can't hold a different context per layer; pass none, or model.new_cache()"
            )
        if cache.sparse_layer != policy.gate_layer:
            raise UserError(
                f"past_key_values: made for sparse_layer={cache.sparse_layer}, the model has {policy.gate_layer}; start a new one"
            )
        if cache.rule != policy.cache_rule:
            raise UserError(f"past_key_values: made for another policy than {policy.name}; start a new one")

    @staticmethod
    def _valid_columns(
        attention_mask: torch.Tensor | None, batch: int, length: int, seen: int, device: torch.device
    ) -> torch.Tensor:
        if attention_mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=device)
        if attention_mask.shape != (batch, seen + length):
            raise UserError(
                f"attention_mask: shape {tuple(attention_mask.shape)}, expected {(batch, seen + length)} "
                f"({seen} cached columns and {length} new ones)"
            )
        return attention_mask[:, -length:].bool()

    @staticmethod
    def _position_ids(
        attention_mask: torch.Tensor | None, valid: torch.Tensor, cache: SparseContextCache | None
    ) -> torch.Tensor:
        if attention_mask is not None:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -valid.shape[1] :]
        new = torch.arange(valid.shape[1], device=valid.device)[None]
        # Layers before l hold every real token, so their length is the next position.
        if cache is None or cache.dense.lengths is None:
            return new
        return new + cache.next_positions()


AutoModel.register(DynamicLlamaConfig, DynamicLlamaModel)
