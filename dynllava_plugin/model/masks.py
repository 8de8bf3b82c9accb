"""What each token of a call may see, as the attention implementations want it."""

from __future__ import annotations

import torch
from transformers.masking_utils import create_causal_mask

from dynllava_plugin.model.configuration import DynamicLlamaConfig


def context_mask(
    config: DynamicLlamaConfig,
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
            config=config, inputs_embeds=hidden, attention_mask=padding, past_key_values=None
        )
    else:
        length = hidden.shape[1]
        itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        mask = causal & (keep[:, None, None, :] | itself)
    # SDPA would turn a step's mask into an additive one in every layer.
    step = bool(seen) and hidden.shape[1] == 1
    if mask is None or not (step or config._attn_implementation == "eager"):
        return mask
    return additive(mask, hidden)


def additive(mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """A bool mask as what is added to the scores, in the dtype of `hidden`."""
    return torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(
        ~mask, torch.finfo(hidden.dtype).min
    )
