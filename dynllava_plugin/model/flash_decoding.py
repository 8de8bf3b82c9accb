"""Decode steps over a ragged cache through flash-attention's KV-cache kernel, where that package is installed.

The kernel takes how many slots each sample holds instead of a mask, so that it reads no slot in vain and splits a long context
over the whole GPU. Without the package the step goes through SDPA with a mask, which computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def _kernel() -> Callable[..., Any] | None:
    try:
        from flash_attn import flash_attn_with_kvcache
    except (ImportError, OSError):  # absent, or built for another PyTorch
        return None
    return flash_attn_with_kvcache


def flash_step(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor | None:
    """Return the attention [B, 1, H, D] of one token a sample to the slots up to its own.

    `query` is [B, H, 1, D]; `keys` and `values` [B, H_kv, K, D] are a layer's buffers, the new token's own included; `slots` int64 [B]
    is where that lies. None where the kernel isn't there or takes no such tensors, or the call is no single-token step.
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
