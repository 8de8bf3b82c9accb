"""Batches whose samples lost different numbers of tokens, packed to the right."""

from __future__ import annotations

import torch

from dynllava_plugin.model.gate import Decision
from dynllava_plugin.policies import TokenLayout
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.tracks import packing_order


def without_removed(
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    valid: torch.Tensor,
    layout: TokenLayout,
    cache: SparseContextCache | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TokenLayout, torch.Tensor]:
    """The call without the image tokens that stay outside, and the input column [B, L'] of each token."""
    gone = layout.removed & valid
    position_ids = position_ids.expand(valid.shape)
    if layout.packed_positions:
        position_ids = position_ids - gone.cumsum(1)
    if cache is not None:
        cache.note_removed(gone.sum(1, keepdim=True), layout.packed_positions)
    columns, _ = pack_present(valid & ~gone, valid, 0)
    there = columns >= 0
    shorter = TokenLayout(
        image_mask=gather_columns(layout.image_mask, columns) & there,
        output_mask=None
        if layout.output_mask is None
        else gather_columns(layout.output_mask, columns) & there,
        # Rows are packed to the right: an output token is no farther from their end than before.
        output_start=max(0, layout.output_start - (valid.shape[1] - columns.shape[1])),
    )
    return gather_columns(hidden, columns), gather_columns(position_ids, columns), there, shorter, columns


def present_tokens(
    decision: Decision, valid: torch.Tensor, layout: TokenLayout, last_only: bool
) -> torch.Tensor:
    """bool [B, L]: tokens that layers from l on compute; a dropped output token still predicts its successor."""
    if layout.output_mask is None:
        return decision.keep
    if not last_only:
        return decision.keep | (layout.output_mask & valid)
    columns = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, columns, -1).amax(1, keepdim=True)
    return decision.keep | (columns == last)


def pack_present(
    present: torch.Tensor, valid: torch.Tensor, seen: int, last_only: bool = False
) -> tuple[torch.Tensor, bool]:
    """(int64 [B, L'] input columns of the present tokens packed to the right, -1 before; whether that differs from the input).

    With `last_only` every sample's last token ends up in the last column, on whichever side its padding is.
    """
    batch, length = present.shape
    columns = torch.arange(length, device=present.device).expand(batch, -1)
    if (seen and length == 1) or bool((present == valid).all() and (not last_only or valid[:, -1].all())):
        return torch.where(valid, columns, -1), False
    order, counts = packing_order(present)
    width = order.shape[1]
    slot = torch.arange(width, device=present.device) - (width - counts[:, None])  # [B, L'] < 0 on padding
    return torch.where(slot >= 0, order.gather(1, slot.clamp(min=0)), -1), True


def gather_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[B or 1, L, ...] values -> [B, L', ...] at `columns` int64 [B, L'] (-1 gives column 0)."""
    index = columns.clamp(min=0)
    values = values.expand(len(index), *values.shape[1:])
    return values.gather(
        1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])
    )


def at_columns(values: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
    """bool [B, n] of the last n of `columns` int64 [B, L'] (-1 is none) -> [B, length], True in those columns."""
    columns = columns[:, columns.shape[1] - values.shape[1] :]
    spread = values.new_zeros(len(values), length + 1)  # the last column takes what belongs nowhere
    return spread.scatter_(1, columns.masked_fill(columns < 0, length), values)[:, :length]
