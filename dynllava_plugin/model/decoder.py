"""A Llama decoder with one gate at layer l."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.attention import MASKED_SOFTMAX
from dynllava_plugin.model.attention_rows import Watch, WatchLastPromptToken
from dynllava_plugin.model.configuration import DynamicLlamaConfig
from dynllava_plugin.model.flash_decoding import flash_step
from dynllava_plugin.model.gate import Decision, TrainingMasks, decide, decide_training
from dynllava_plugin.policies import Gate, Policy, TokenLayout, policy_of
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.masked_softmax import TrainingContext, training_context
from dynllava_plugin.sparsity.predictors import ImagePredictor, TextPredictor
from dynllava_plugin.sparsity.tracks import packing_order


@dataclass
class DynamicLlamaOutput(BaseModelOutputWithPast):
    """Hidden states and what the gate decided.

    `token_index` int64 [B, L'] is the column of the input each hidden state belongs to, -1 on padding: samples that lose
    tokens are packed to the right. `decision` is set at inference, `masks` in training.
    """

    token_index: torch.Tensor | None = None
    decision: Decision | None = None
    masks: TrainingMasks | None = None


class DynamicLlamaAttention(LlamaAttention):
    """Llama attention that takes a learned context in training and ragged KV-cache masks in decoding."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: SparseContextCache | None = None,
        context: TrainingContext | None = None,
        watch: Watch | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A `context` selects the masked softmax (Eq. 7), which needs no `attention_mask`.

        `watch` sees the layer's queries and keys, for policies that rank tokens by attention.
        """
        batch, length, _ = hidden_states.shape
        per_head = (batch, length, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(per_head).transpose(1, 2)
        key = self.k_proj(hidden_states).view(per_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        if "flash" in implementation and past_key_values is not None:
            slots = past_key_values.step_slots(self.layer_idx)
            mixed = None if watch is not None else flash_step(query, key, value, slots, self.scaling)
            if mixed is not None:
                return self.o_proj(mixed.reshape(batch, length, -1)), None
        if attention_mask is not None and attention_mask.dim() == 4 and "flash" in implementation:
            implementation = "sdpa"  # flash attention takes no [q, K] mask
        if context is not None:
            implementation, kwargs = MASKED_SOFTMAX, {**kwargs, "context": context}
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if watch is not None:  # afterwards: it may let go of what was just attended
            watch(self.layer_idx, query, key, attention_mask, self.scaling)
        return self.o_proj(mixed.reshape(batch, length, -1)), weights


class DynamicLlamaDecoderLayer(LlamaDecoderLayer):
    """A Llama layer around `DynamicLlamaAttention`."""

    def __init__(self, config: DynamicLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = DynamicLlamaAttention(config, layer_idx)


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
            hidden, position_ids, valid, layout, columns = self._without_removed(
                hidden, position_ids, valid, layout, cache
            )
        watch = WatchLastPromptToken.of(policy.attention_layer, valid, layout)
        mask = self._context_mask(
            cache.dense.begin(valid) if cache is not None else None, hidden, valid, seen
        )
        hidden = self._run(
            self.layers[: self.sparse_layer], hidden, mask, position_ids, cache, watch=watch, **kwargs
        )

        attention = None if watch is None else watch.weights
        gate = Gate(hidden, valid, position_ids, layout, self.image_predictor, self.text_predictor, attention)
        decision = decide(policy, gate)
        decision.add_removed(given)
        if columns is not None and decision.text_keep is not None:
            decision.text_keep = _at_columns(decision.text_keep, columns, length)[:, given.output_start :]
        keep, present = decision.keep, self._present(decision, valid, layout, last_only)
        token_index, gathered = self._token_index(present, valid, seen, last_only)
        if gathered:
            hidden, position_ids = _gather(hidden, token_index), _gather(position_ids, token_index)
            valid = token_index >= 0
            keep = _gather(keep, token_index) & valid
        if columns is not None:
            token_index = torch.where(valid, _gather(columns, token_index), -1)
        step_mask = cache.sparse.begin(keep) if cache is not None else None
        # With the last token alone in demand every other one here is kept: the causal order says it all.
        dropped = keep if layout.output_mask is not None and not last_only else None
        mask = self._context_mask(step_mask, hidden, valid, seen, dropped)
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
        causal = self._context_mask(None, inputs_embeds, torch.ones_like(valid) if behind else valid, 0)
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
        mask = _additive(dense.begin_static(valid), inputs_embeds)
        hidden = self._run(self.layers[: cache.sparse_layer], inputs_embeds, mask, position_ids, cache)
        layout = TokenLayout(output_mask=valid)
        gate = Gate(hidden, valid, position_ids, layout, self.image_predictor, self.text_predictor)
        decision = decide(policy, gate)
        mask = _additive(sparse.begin_static(decision.keep), hidden)
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

    def _without_removed(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        valid: torch.Tensor,
        layout: TokenLayout,
        cache: SparseContextCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TokenLayout, torch.Tensor]:
        """The call without the image tokens that stay outside, and the input column [B, L'] of each token."""
        gone = layout.removed & valid
        position_ids = position_ids.expand(valid.shape)
        if layout.packed_positions:
            position_ids = position_ids - gone.cumsum(1)
        if cache is not None:
            cache.note_removed(gone.sum(1, keepdim=True), layout.packed_positions)
        columns, _ = self._token_index(valid & ~gone, valid, 0)
        there = columns >= 0
        shorter = TokenLayout(
            image_mask=_gather(layout.image_mask, columns) & there,
            output_mask=None if layout.output_mask is None else _gather(layout.output_mask, columns) & there,
            # Rows are packed to the right: an output token is no farther from their end than before.
            output_start=max(0, layout.output_start - (valid.shape[1] - columns.shape[1])),
        )
        return _gather(hidden, columns), _gather(position_ids, columns), there, shorter, columns

    @staticmethod
    def _present(
        decision: Decision, valid: torch.Tensor, layout: TokenLayout, last_only: bool
    ) -> torch.Tensor:
        """bool [B, L]: tokens that layers from l on compute; a dropped output token still predicts its successor."""
        if layout.output_mask is None:
            return decision.keep
        if not last_only:
            return decision.keep | (layout.output_mask & valid)
        columns = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid, columns, -1).amax(1, keepdim=True)
        return decision.keep | (columns == last)

    @staticmethod
    def _token_index(
        present: torch.Tensor, valid: torch.Tensor, seen: int, last_only: bool = False
    ) -> tuple[torch.Tensor, bool]:
        """(int64 [B, L'] input columns of the present tokens packed to the right, -1 before; whether that differs from the input).

        With `last_only` every sample's last token ends up in the last column, on whichever side its padding is.
        """
        batch, length = present.shape
        columns = torch.arange(length, device=present.device).expand(batch, -1)
        if (seen and length == 1) or bool((present == valid).all() and (not last_only or valid[:, -1].all())):
            return torch.where(valid, columns, -1), False
        order, counts = packing_order(present)
        width = order.shape[1]
        slot = torch.arange(width, device=present.device) - (
            width - counts[:, None]
        )  # [B, L'] < 0 on padding
        return torch.where(slot >= 0, order.gather(1, slot.clamp(min=0)), -1), True

    def _context_mask(
        self,
        cached: torch.Tensor | None,
        hidden: torch.Tensor,
        valid: torch.Tensor,
        seen: int,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The mask the attention implementation wants: `cached` behind a context, else causal, padding and `keep` (diagonal free)."""
        if seen:
            mask = cached
        elif keep is None or torch.equal(keep, valid):
            padding = None if bool(valid.all()) else valid
            return create_causal_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=padding, past_key_values=None
            )
        else:
            length = hidden.shape[1]
            itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
            mask = _causal(length, hidden.device) & (keep[:, None, None, :] | itself)
        # SDPA would turn a step's mask into an additive one in every layer.
        step = bool(seen) and hidden.shape[1] == 1
        if mask is None or not (step or self.config._attn_implementation == "eager"):
            return mask
        return _additive(mask, hidden)


def _additive(mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """A bool mask as what is added to the scores, in the dtype of `hidden`."""
    return torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(
        ~mask, torch.finfo(hidden.dtype).min
    )


def _gather(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[B or 1, L, ...] values -> [B, L', ...] at `columns` int64 [B, L'] (-1 gives column 0)."""
    index = columns.clamp(min=0)
    values = values.expand(len(index), *values.shape[1:])
    return values.gather(
        1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])
    )


def _at_columns(values: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
    """bool [B, n] of the last n of `columns` int64 [B, L'] (-1 is none) -> [B, length], True in those columns."""
    columns = columns[:, columns.shape[1] - values.shape[1] :]
    spread = values.new_zeros(len(values), length + 1)  # the last column takes what belongs nowhere
    return spread.scatter_(1, columns.masked_fill(columns < 0, length), values)[:, :length]


def _causal(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()


AutoModel.register(DynamicLlamaConfig, DynamicLlamaModel)
