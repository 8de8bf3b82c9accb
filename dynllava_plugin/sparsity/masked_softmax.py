"""Training attention: softmax under learned 0/1 masks with an exact straight-through gradient (Eq. 7).

First as it stands in the paper, with the whole matrix in memory: what the rest is checked and timed against. Then in O(L) memory.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch

from dynllava_plugin.sparsity.kernels import blocks
from dynllava_plugin.sparsity.kernels.blocks import DROPPED, KEPT, PADDING

# A dropped token may outweigh the best kept one by any factor e^(x - max over kept). Its weight forward is 0 all the same,
# but its gradient grows with that factor: on a trained model it reached norms of 1e9 and clipping then erased every other
# gradient. Up to e^8 the gradient is exact; beyond, it is that of e^8. (The published code bounds it by its epsilon of 1e-6.)
MAX_EXPONENT = 8.0


def context_matrix(keep: torch.Tensor) -> torch.Tensor:
    """Return G of Eq. 7, [B, 1, L, L] of keep masks [B, L]: G[i, j] = keep[j] and G[i, i] = 1 (a token always sees itself)."""
    length = keep.shape[1]
    diagonal = torch.eye(length, dtype=torch.bool, device=keep.device)
    return torch.where(diagonal, torch.ones_like(keep)[:, None, :], keep[:, None, :])[:, None]


def visible_matrix(valid: torch.Tensor) -> torch.Tensor:
    """Return bool [B, 1, L, L], what causal order and padding (`valid` bool [B, L] False) let each token see."""
    length = valid.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=valid.device).tril() & valid[:, None, None]


def plain_masked_softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return out_i = sum_j e^{x_ij} G_ij v_j / sum_j e^{x_ij} G_ij, its gradients left to autograd: O(L^2) memory.

    `context` and `visible` are `context_matrix` and `visible_matrix`; the rest is as in `masked_softmax_attention`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    kept = visible & (context.detach() > 0)
    # The maximum over kept tokens only: with all of them far below a dropped one the sum must not vanish.
    top = scores.detach().masked_fill(~kept, float("-inf")).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    # masked_fill before exp: a hidden score must not overflow and turn 0 * inf into NaN in the gradient.
    exponent = (scores - top).masked_fill(~visible, float("-inf")).clamp(max=MAX_EXPONENT)
    weights = exponent.exp() * context
    total = weights.sum(-1, keepdim=True)
    # A row with no kept token: dividing by infinity gives it zeros, and no gradient.
    probabilities = weights / total.masked_fill(total == 0, float("inf"))
    return probabilities.to(value.dtype) @ value


class TrainingContext(NamedTuple):
    """Which tokens are context, the same in every layer from l on.

    `keep` float [B, L] is exactly 0 or 1 and carries the straight-through gradient to the predictors. `packing` int32 [B, 3, L] has of
    each sample its columns in the order kept, dropped, padding; how many of the columns 0..i are kept; and the kind of each
    column (`KEPT`, `DROPPED`, `PADDING`).
    """

    keep: torch.Tensor
    packing: torch.Tensor


def training_context(keep: torch.Tensor, valid: torch.Tensor) -> TrainingContext:
    """Return the context of [B, L] keep masks (float, 0 or 1) and `valid` bool [B, L] (False on padding, anywhere)."""
    kept = valid & (keep.detach() > 0)
    kinds = torch.where(kept, KEPT, torch.where(valid, DROPPED, PADDING))
    order = kinds.argsort(dim=1, stable=True)
    return TrainingContext(keep, torch.stack([order, kept.cumsum(1), kinds], 1).to(torch.int32))


def masked_softmax_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: TrainingContext, scaling: float
) -> torch.Tensor:
    """Return out_i = sum_j e^{x_ij} G_ij v_j / sum_j e^{x_ij} G_ij over j <= i, with G_ij = keep_j and G_ii = 1 (Eq. 7).

    The gradient of G_ij is p~_ij * (dO_i . (v_j - O_i)), nonzero for dropped tokens too; a bias of log(G) would lose it.
    A dropped token's e^{x_ij} counts there as at most e^8 times that of the row's best kept token. A row that sees
    nothing gives zeros, and no gradient.

    Runs Triton kernels on a CUDA device, strips of rows elsewhere; neither makes an [L, L] tensor. One operator to
    `torch.compile`; under autocast it takes its inputs in autocast's dtype. Differentiable once.

    `query` is [B, H, L, D], `key` and `value` [B, H_kv, L, D] with H a multiple of H_kv (grouped-query attention); `context` is from
    `training_context`, `scaling` the factor of the scores, positive, usually D ** -0.5. The result is [B, H, L, D] in the dtype of
    `value`; sums are in float32, or float64 where the inputs are.
    """
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _forward(query, key, value, context.keep, context.packing, float(scaling))[0]


@torch.library.custom_op("dynllava::masked_softmax", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    packing: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Autocast would also reach the products inside.
    with torch.autocast(query.device.type, enabled=False):
        return implementation(query).forward(query, key, value, packing, scaling, MAX_EXPONENT)


@_forward.register_fake
def _(query: Any, key: Any, value: Any, keep: Any, packing: Any, scaling: float) -> Any:
    sums = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return blocks.empty_output(query), sums, torch.empty_like(sums)


@torch.library.custom_op("dynllava::masked_softmax_backward", mutates_args=())
def _backward(
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
    with torch.autocast(query.device.type, enabled=False):
        return implementation(query).backward(
            upstream, query, key, value, packing, out, lse, cap, scaling, need_keep
        )


@_backward.register_fake
def _(upstream: Any, query: Any, key: Any, value: Any, packing: Any, out: Any, lse: Any, *rest: Any) -> Any:
    gradients = (blocks.empty_gradient(x) for x in (query, key, value))
    return (*gradients, lse.new_empty(query.shape[0], query.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, keep, packing, ctx.scaling = inputs
    ctx.keep_dtype = keep.dtype
    ctx.save_for_backward(query, key, value, packing, *output)


def _differentiate(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    need_keep = ctx.needs_input_grad[3]
    *gradients, keep = _backward(upstream, *ctx.saved_tensors, ctx.scaling, need_keep)
    return (*gradients, keep.to(ctx.keep_dtype) if need_keep else None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def implementation(query: torch.Tensor) -> ModuleType:
    """Return the module that computes attention for such a tensor, Triton's from Ampere on, where it takes dtype and width."""
    if query.is_cuda and torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
        from dynllava_plugin.sparsity.kernels import triton_launch as triton_code

        if triton_code.takes(query):
            return triton_code
    return blocks
