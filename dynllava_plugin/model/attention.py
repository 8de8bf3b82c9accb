"""What the stock layers' attention does here, as attention implementations of transformers' own registry.

A decoder's layers are transformers' own; `sparse_sdpa`, `sparse_eager` and `sparse_flash_attention_2` stand for the
implementation of that name and look at one more argument, `sparse`, that a call hands down to every layer: the training
context of Eq. 7, the cache whose slots a step attends, and who wants to see queries and keys.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies import TokenLayout
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.masked_softmax import TrainingContext, masked_softmax_attention
from dynllava_plugin.sparsity.tracks import packing_order

PREFIX = "sparse_"


class WatchedRows:
    """Computes one layer's attention of a few tokens: each sample's last prompt token, or those a policy names.

    They stand at columns `rows` int64 [B, R], of which those that are `real` bool [B, R] count.
    """

    def __init__(self, layer: int, valid: torch.Tensor, rows: torch.Tensor, real: torch.Tensor) -> None:
        self.layer, self.valid, self.rows, self.real = layer, valid, rows, real
        self.weights: torch.Tensor | None = None  # float32 [B, L], mean over heads and rows

    @classmethod
    def of(
        cls, layers: Sequence[int], start: int, end: int, valid: torch.Tensor, layout: TokenLayout
    ) -> WatchedRows | None:
        """Return one for a segment of layers start..end - 1 with images, whose policy asks for a layer of it; else None."""
        asked = [layer for layer in layers if start <= layer < end]
        if not asked or not layout.image_lengths:
            return None
        layer = asked[-1]
        columns = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid & layout.before_output(columns), columns, 0).amax(1, keepdim=True)
        watched = layout.watched
        if watched is None:
            return cls(layer, valid, last, torch.ones_like(last, dtype=torch.bool))
        rows = packing_order(watched, max(1, int(watched.sum(1).max())))
        real = watched.gather(1, rows)
        none = ~real.any(1, keepdim=True)  # no image in the sample: no one asks what is looked at there
        return cls(layer, valid, torch.where(none, last, rows), real | none)

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
    ) -> None:
        """See a layer's rotated queries [B, H, q, D] and keys [B, H_kv, K, D]; take note where it is the layer."""
        if layer != self.layer:
            return
        batch, heads, _, width = query.shape
        samples = torch.arange(batch, device=query.device)[:, None]
        rows = query.transpose(1, 2)[samples, self.rows]  # [B, R, H, D]
        rows = rows.view(batch, rows.shape[1], key.shape[1], heads // key.shape[1], width)
        scores = torch.einsum("brhgd,bhkd->brhgk", rows, key).float() * scaling
        columns = torch.arange(self.valid.shape[1], device=query.device)
        visible = self.valid[:, None] & (columns <= self.rows[..., None])  # [B, R, L]
        past = key.shape[2] - visible.shape[2]
        if past:  # an image behind a context: only the 4-dimensional mask knows what that holds
            assert attention_mask is not None and attention_mask.dim() == 4
            seen = attention_mask[samples, 0, self.rows]
            visible = seen if seen.dtype == torch.bool else seen == 0
        weights = scores.masked_fill(~visible[:, :, None, None], float("-inf")).softmax(-1).mean((2, 3))
        weights = weights.masked_fill(~self.real[..., None], 0).sum(1) / self.real.sum(1, keepdim=True)
        self.weights = weights[:, past:]


@dataclass
class SparseCall:
    """What the attention of a call's layers has to know beside queries, keys and a mask.

    A `context` selects the masked softmax (Eq. 7), which needs no mask; `watch` is for policies that rank tokens by attention.
    """

    cache: SparseContextCache | None = None
    context: TrainingContext | None = None
    watch: WatchedRows | None = None


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

    Raises `UserError` for dropout beside a training context: Eq. 7 has none.
    """
    name = implementation_of(module.config)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache = None if sparse is None else sparse.cache
    if sparse is not None and sparse.context is not None:
        if dropout:
            raise UserError(
                f"attention_dropout: {dropout} is not supported by the masked softmax; set it to 0 in the model's config"
            )
        return masked_softmax_attention(query, key, value, sparse.context, scaling).transpose(1, 2), None
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


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """Return flash-attention's KV-cache kernel, where that package is installed."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except (ImportError, OSError):  # absent, or built for another PyTorch
        return None
    return flash_attn_with_kvcache


def flash_step(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor | None, scaling: float
) -> torch.Tensor | None:
    """Return the attention [B, 1, H, D] of one token a sample to the slots up to its own, by flash-attention's KV-cache kernel.

    That takes how many slots each sample holds instead of a mask: it reads no slot in vain and splits a long context over the
    whole GPU. Where it isn't there the step goes through SDPA with a mask, which computes the same.

    `query` is [B, H, 1, D]; `keys` and `values` [B, H_kv, K, D] are a layer's buffers, the new token's own included; `slots` int64
    [B] is where that lies. None where the kernel takes no such tensors, or the call is no single-token step.
    """
    kernel = _kernel() if slots is not None and query.dtype in (torch.float16, torch.bfloat16) else None
    if kernel is None or query.shape[2] != 1:
        return None
    return kernel(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        cache_seqlens=(slots + 1).to(torch.int32),  # type: ignore[operator, union-attr]
        softmax_scale=scaling,
    )


def implementation_of(config: Any) -> str:
    """Return the attention implementation that a text config was given: "sdpa", "eager", "flash_attention_2", ..."""
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


def use_sparse_attention(config: Any) -> None:
    """Let the layers of a text config go through `sparse_attention`, whatever implementation was chosen for them.

    Raises `UserError` for an implementation whose masks aren't tensors of [q, K] or [K] columns.
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
    """Return the mask of a call without a context before it: causal, the diagonal free, over the columns `keep` bool [B, L].

    `counts` are how many of each sample, where the host knows; `hidden` is [B, L, d].
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
