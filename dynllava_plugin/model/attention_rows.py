"""Attention weights of a few rows, for policies that rank tokens by attention while SDPA or flash do the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynllava_plugin.policies import TokenLayout
from dynllava_plugin.sparsity.tracks import packing_order


class WatchedRows:
    """Computes the attention of a few tokens in one layer: the last prompt token's, or of those a policy names.

    Parameters
    ----------
    layer : int
    valid : bool [B, L]
    rows : int64 [B, R]
        Their columns.
    real : bool [B, R]
        Which of them count.
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
        none = ~real.any(
            1, keepdim=True
        )  # no image in the sample: what is looked at there is asked by no one
        return cls(layer, valid, torch.where(none, last, rows), real | none)

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
    ) -> None:
        """Take note where it is the layer."""
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
