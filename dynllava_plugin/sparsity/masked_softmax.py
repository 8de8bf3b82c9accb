"""Training attention: softmax under learned 0/1 masks with an exact straight-through gradient (Eq. 7)."""

from __future__ import annotations

import torch

# A dropped token may outweigh the best kept one by any factor e^(x - max over kept). Its weight forward is 0 all the same,
# but its gradient grows with that factor: on a trained model it reached norms of 1e9 and clipping then erased every other
# gradient. Up to e^8 the gradient is exact; beyond, it is that of e^8. (The published code bounds it by its epsilon of 1e-6.)
_MAX_EXPONENT = 8.0


def context_matrix(keep: torch.Tensor) -> torch.Tensor:
    """G of Eq. 7: [B, L] keep masks -> [B, 1, L, L], G[i, j] = keep[j] and G[i, i] = 1 (a token always sees itself)."""
    length = keep.shape[1]
    diagonal = torch.eye(length, dtype=torch.bool, device=keep.device)
    return torch.where(diagonal, torch.ones_like(keep)[:, None, :], keep[:, None, :])[:, None]


def masked_softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """out_i = sum_j e^{x_ij} G_ij v_j / sum_j e^{x_ij} G_ij.

    The gradient of G_ij is p~_ij * (dO_i . (v_j - O_i)), nonzero for dropped tokens too; a bias of log(G) would lose it.
    A dropped token's e^{x_ij} counts there as at most e^8 times that of the row's best kept token.

    Parameters
    ----------
    query : [B, H, L, D]; key, value : [B, H_kv, L, D]
        H is a multiple of H_kv (grouped-query attention).
    context : float [B, 1, L, L]
        G, as from `context_matrix`; carries the gradient to the predictors.
    visible : bool [B, 1, L, L]
        Causal order and padding; a row that sees nothing gives zeros.
    scaling : float
        Factor of the scores, usually D ** -0.5.

    Returns
    -------
    [B, H, L, D] in the dtype of `value`.
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
    exponent = (scores - top).masked_fill(~visible, float("-inf")).clamp(max=_MAX_EXPONENT)
    weights = exponent.exp() * context
    total = weights.sum(-1, keepdim=True)
    probabilities = weights / torch.where(total > 0, total, torch.ones_like(total))
    return probabilities.to(value.dtype) @ value
