"""A Llama layer that takes a learned context in training and a ragged KV cache in decoding."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from dynllava_plugin.model.attention import MASKED_SOFTMAX
from dynllava_plugin.model.attention_rows import Watch
from dynllava_plugin.model.configuration import DynamicLlamaConfig
from dynllava_plugin.model.flash_decoding import flash_step
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.masked_softmax import TrainingContext


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
