"""The training attention as one of transformers' attention implementations, `masked_softmax`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dynllava_plugin.errors import UserError
from dynllava_plugin.sparsity.masked_softmax import TrainingContext, masked_softmax_attention

MASKED_SOFTMAX = "masked_softmax"


def masked_softmax_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    context: TrainingContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Eq. 7 where there is a `context`, which knows the padding; SDPA elsewhere, since no token of such a layer can be dropped.

    query [B, H, L, D]; key, value [B, H_kv, L, D] -> [B, L, H, D].

    Raises
    ------
    UserError
        Dropout, which Eq. 7 has none of.
    """
    if context is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise UserError(
            f"attention_dropout: {dropout} is not supported by the masked softmax; set it to 0 in the model's config"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return masked_softmax_attention(query, key, value, context, scaling).transpose(1, 2), None


AttentionInterface.register(MASKED_SOFTMAX, masked_softmax_forward)
AttentionMaskInterface.register(MASKED_SOFTMAX, sdpa_mask)
