"""Runs the Triton kernels of the training attention on tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from dynllava_plugin.sparsity.kernels import triton_kernels as kernels
from dynllava_plugin.sparsity.kernels.blocks import empty_gradient, empty_output

_MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the score matrix that one program holds at a time, and how its kernel is compiled."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """A tile for each kernel: forward, query gradient, gradients of kept columns and of dropped ones."""

    forward: Tile
    query: Tile
    kept: Tile
    dropped: Tile


def takes(query: torch.Tensor) -> bool:
    """Return whether the kernels compute attention for such a CUDA tensor."""
    new_enough = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return new_enough and query.dtype in _DTYPES and query.shape[-1] <= _MAX_HEAD_DIM


def tiles_for(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Return tiles that fit Ampere, Ada or Hopper GPUs; for 128 on Hopper they were the fastest of those tried."""
    large = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    if dtype == torch.float32:
        small = Tile(32, 32) if head_dim <= 128 else Tile(16, 16)
        return Tiles(small, small, small, small)
    if head_dim <= 64:
        return Tiles(Tile(128, 64, 4, 5), Tile(64, 64, 4, 3), Tile(64, 128, 8, 2), Tile(64, 128, 8, 2))
    if head_dim <= 128 and large:
        return Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    if head_dim <= 128:
        return Tiles(Tile(128, 32, 4, 4), Tile(64, 32, 4, 3), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2))
    return Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: torch.Tensor,
    scaling: float,
    max_exponent: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Eq. 7 as `blocks.forward`, with `lse` and `cap` in base 2."""
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    batch, heads, length, dim = query.shape
    out = empty_output(query)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    cap = torch.empty_like(lse)
    tile = tiles_for(dim, query.dtype, query.device).forward
    with _device_of(query):
        kernels._forward_kernel[(triton.cdiv(length, tile.rows) * batch * heads,)](
            query, key, value, out, lse, cap, packing,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            heads, heads // key.shape[1], length, scaling * _LOG2_E, max_exponent * _LOG2_E,
            **constants(dim, query.dtype, tile),
        )  # fmt: skip
    return out, lse, cap


def backward(
    upstream: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cap: torch.Tensor,
    scaling: float,
    need_keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients as `blocks.backward` gives them."""
    grad_query, grad_key, grad_value = (empty_gradient(x) for x in (query, key, value))
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    upstream, out = _unit_stride(upstream), _unit_stride(out)
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    grad_keep = torch.empty(batch, kv_heads, length, dtype=torch.float32, device=query.device)
    delta = torch.empty_like(lse)
    tiles = tiles_for(dim, query.dtype, query.device)
    shape = (heads // kv_heads, length, scaling * _LOG2_E, scaling)
    with _device_of(query):
        kernels._query_kernel[(triton.cdiv(length, tiles.query.rows) * batch * heads,)](
            query, key, value, out, upstream, lse, delta, grad_query, packing,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            *upstream.stride()[:3], *grad_query.stride()[:3],
            heads, *shape, **constants(dim, query.dtype, tiles.query),
        )  # fmt: skip
        strides = (
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *upstream.stride()[:3],
            *grad_key.stride()[:3], *grad_value.stride()[:3],
        )  # fmt: skip
        kernels._kept_kernel[(triton.cdiv(length, tiles.kept.columns) * batch * kv_heads,)](
            query, key, value, upstream, lse, delta, grad_key, grad_value, grad_keep, packing,
            *strides, kv_heads, *shape, **constants(dim, query.dtype, tiles.kept),
        )  # fmt: skip
        kernels._dropped_kernel[(triton.cdiv(length, tiles.dropped.columns) * batch * kv_heads,)](
            query, key, value, upstream, lse, cap, delta, grad_key, grad_value, grad_keep, packing,
            *strides, kv_heads, *shape, NEED_KEEP=need_keep, **constants(dim, query.dtype, tiles.dropped),
        )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_keep.sum(1)


def constants(dim: int, dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    """Return the compile-time arguments of a kernel."""
    return dict(
        D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        # Three products of TensorFloat-32: as exact as float32's own, which tensor cores don't do.
        PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _device_of(tensor: torch.Tensor) -> Any:
    """Kernels start on the current CUDA device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
