"""Attention weights of single rows, for policies that rank tokens by attention while SDPA or flash do the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynllava_plugin.policies import TokenLayout


class WatchLastPromptToken:
    """Computes the last prompt token's attention in one layer.

    Parameters
    ----------
    layer : int
    valid : bool [B, L]
    rows : int64 [B]
        The column of each sample's last prompt token.
    """

    def __init__(self, layer: int, valid: torch.Tensor, rows: torch.Tensor) -> None:
        self.layer, self.valid, self.rows = layer, valid, rows
        self.weights: torch.Tensor | None = None  # float32 [B, L], mean over heads

    @classmethod
    def of(
        cls, layers: Sequence[int], start: int, end: int, valid: torch.Tensor, layout: TokenLayout
    ) -> WatchLastPromptToken | None:
        """Return one for a segment of layers start..end - 1 with images, whose policy asks for a layer of it; else None."""
        asked = [layer for layer in layers if start <= layer < end]
        if not asked or not layout.image_lengths:
            return None
        layer = asked[-1]
        columns = torch.arange(valid.shape[1], device=valid.device)
        return cls(layer, valid, torch.where(valid & layout.before_output(columns), columns, 0).amax(1))

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
        row = query[torch.arange(batch, device=query.device), :, self.rows]  # [B, H, D]
        row = row.view(batch, key.shape[1], heads // key.shape[1], width)
        scores = torch.einsum("bhgd,bhkd->bhgk", row, key).float() * scaling
        columns = torch.arange(self.valid.shape[1], device=query.device)
        visible = self.valid & (columns <= self.rows[:, None])
        past = key.shape[2] - visible.shape[1]
        if past:  # an image behind a context: only the 4-dimensional mask knows what that holds
            assert attention_mask is not None and attention_mask.dim() == 4
            seen = attention_mask[torch.arange(batch, device=query.device), 0, self.rows]
            visible = seen if seen.dtype == torch.bool else seen == 0
        weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
        self.weights = weights.mean((1, 2))[:, past:]
