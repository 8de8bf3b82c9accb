"""What the stock layers' attention does here, as attention implementations of transformers' own registry.

A decoder's layers are transformers' own; `sparse_sdpa`, `sparse_eager` and `sparse_flash_attention_2` stand for the
implementation of that name and look at one more argument, `sparse`, that a call hands down to every layer: the training
context of Eq. 7, the cache whose slots a step attends, and who wants to see queries and keys.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.flash_decoding import flash_step
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.masked_softmax import TrainingContext, masked_softmax_attention

PREFIX = "sparse_"


class Watch(Protocol):
    """Sees a layer's rotated queries [B, H, q, D] and keys [B, H_kv, K, D] after they were attended."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
    ) -> None: ...


@dataclass
class SparseCall:
    """What the attention of a call's layers has to know beside queries, keys and a mask.

    Parameters
    ----------
    cache : SparseContextCache, optional
    context : TrainingContext, optional
        Selects the masked softmax (Eq. 7), which needs no mask.
    watch : callable, optional
        For policies that rank tokens by attention.
    """

    cache: SparseContextCache | None = None
    context: TrainingContext | None = None
    watch: Watch | None = None


def sparse_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sparse: SparseCall | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return attention [B, L, H, D] of query [B, H, L, D] and key, value [B, H_kv, K, D], and weights where there are any.

    Raises
    ------
    UserError
        Dropout beside a training context: Eq. 7 has none.
    """
    name = implementation_of(module.config)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache = None if sparse is None else sparse.cache
    if sparse is not None and sparse.context is not None:
        return masked_softmax_forward(query, key, value, sparse.context, scaling, dropout), None
    if cache is not None and "flash" in name and sparse.watch is None and not cache.observes:  # type: ignore[union-attr]
        mixed = flash_step(query, key, value, cache.step_slots(module.layer_idx), scaling)
        if mixed is not None:
            return mixed, None
    if attention_mask is not None and attention_mask.dim() == 4 and "flash" in name:
        name = "sdpa"  # flash attention takes no [q, K] mask
    eager = sys.modules[type(module).__module__].eager_attention_forward  # each model's own
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    mixed, weights = attend(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    # Afterwards: a cache may let go of what was just attended.
    if sparse is not None and sparse.watch is not None:
        sparse.watch(module.layer_idx, query, key, attention_mask, scaling)
    if cache is not None and cache.observes:
        cache.observe(module.layer_idx, query, key, scaling)
    return mixed, weights


def masked_softmax_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: TrainingContext,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return Eq. 7 of query [B, H, L, D] and key, value [B, H_kv, L, D] as [B, L, H, D].

    Raises
    ------
    UserError
        Dropout, which Eq. 7 has none of.
    """
    if dropout:
        raise UserError(
            f"attention_dropout: {dropout} is not supported by the masked softmax; set it to 0 in the model's config"
        )
    return masked_softmax_attention(query, key, value, context, scaling).transpose(1, 2)


def implementation_of(config: Any) -> str:
    """Return the attention implementation that a text config was given: "sdpa", "eager", "flash_attention_2", ..."""
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


def use_sparse_attention(config: Any) -> None:
    """Let the layers of a text config go through `sparse_attention`, whatever implementation was chosen for them.

    Raises
    ------
    UserError
        An implementation whose masks aren't tensors of [q, K] or [K] columns.
    """
    name = config._attn_implementation or "eager"
    if name.startswith(PREFIX):
        return
    if PREFIX + name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        if "flex" in name or "paged" in name:
            raise UserError(
                f"attn_implementation: {name!r} is not supported; choose eager, sdpa or flash_attention_2"
            )
        AttentionInterface.register(PREFIX + name, sparse_attention)
        like = name if name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys() else "flash_attention_2"
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[like])
    config._attn_implementation_internal = PREFIX + name


def context_mask(
    config: Any, keep: torch.Tensor, counts: Sequence[int] | None, hidden: torch.Tensor
) -> torch.Tensor | None:
    """Return the mask of a call without a context before it: causal, over the columns that `keep`, the diagonal free.

    Parameters
    ----------
    keep : bool [B, L]
        Columns that later ones may see.
    counts : sequence of int, optional
        How many of each sample, where the host knows.
    hidden : [B, L, d]
    """
    counts = keep.sum(1).tolist() if counts is None else counts
    length = hidden.shape[1]
    eager = implementation_of(config) == "eager"
    if min(counts) == length and not eager:
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
    mask = causal & (keep[:, None, None, :] | itself)
    return additive(mask, hidden) if eager else mask


def additive(mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return a bool mask as what is added to the scores, in the dtype of `hidden`."""
    zero = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    return torch.where(mask, zero, torch.finfo(hidden.dtype).min)
