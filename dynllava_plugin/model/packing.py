"""The tokens of a call on their way through the segments: batches whose samples lose different numbers, packed to the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dynllava_plugin.model.gate import Decision
from dynllava_plugin.policies import TokenLayout
from dynllava_plugin.sparsity.tracks import packing_order


@dataclass(frozen=True)
class Tokens:
    """What is present in a segment.

    Parameters
    ----------
    hidden : [B, L, d]
    position_ids : int64 [B or 1, L], or [3, B, L] where images turn on three axes
    text_positions : int64 [B or 1, L]
        Places in the text: `position_ids` where those are the same.
    valid : bool [B, L]
        False on padding.
    keep : bool [B, L]
        Tokens that later ones may see.
    counts : tuple of int, optional
        Real tokens of each sample, where the host knows.
    columns : int64 [B, L], optional
        The input column of each token, -1 on padding; None while the tokens are as given.
    layout : TokenLayout
        Of these tokens.
    deepstack : tuple of [B, L, d]
        What is still to be added behind the next layers.
    entered : [B, L, d], optional
        What entered the last layer that was run.
    """

    hidden: torch.Tensor
    position_ids: torch.Tensor
    text_positions: torch.Tensor
    valid: torch.Tensor
    keep: torch.Tensor
    counts: Sequence[int] | None
    columns: torch.Tensor | None
    layout: TokenLayout
    deepstack: tuple[torch.Tensor, ...] = ()
    entered: torch.Tensor | None = None

    @classmethod
    def of(cls, hidden: torch.Tensor, positions: torch.Tensor, layout: TokenLayout) -> Tokens:
        """Return unpadded tokens [B, L, d] with positions int64 [1, L] as they enter a decoder."""
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return cls(hidden, positions, positions, valid, valid, layout.counts, None, layout)

    @property
    def keep_counts(self) -> Sequence[int] | None:
        """`keep`'s counts, where the host knows."""
        return self.counts if self.keep is self.valid else None

    @property
    def token_index(self) -> torch.Tensor:
        """int64 [B, L]: the input column of each token, -1 on padding."""
        if self.columns is not None:
            return self.columns
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return torch.where(self.valid, columns, -1)

    def first(self, order: torch.Tensor, lengths: torch.Tensor) -> Tokens:
        """Return the tokens at `order` int64 [B, n], of which the first `lengths` int64 [B] are real; without a layout."""
        there = torch.arange(order.shape[1], device=order.device) < lengths[:, None]
        positions = gather_positions(self.position_ids, order)
        same = self.text_positions is self.position_ids
        text = positions if same else gather_positions(self.text_positions, order)
        levels = tuple(gather_columns(level, order) for level in self.deepstack)
        return Tokens(
            gather_columns(self.hidden, order),
            positions,
            text,
            there,
            there,
            None,
            None,
            TokenLayout(),
            levels,
        )

    def packed(self, present: torch.Tensor, counts: Sequence[int], layout_too: bool) -> Tokens:
        """Return the tokens that are `present` bool [B, L], `counts` of each sample, packed to the right.

        `layout_too` says whether a later gate will ask where images and output text are.
        """
        order, there = packed_columns(present, counts)
        columns = order if self.columns is None else gather_columns(self.columns, order)
        layout = shorter_layout(self.layout, order, there) if layout_too else TokenLayout()
        positions = gather_positions(self.position_ids, order)
        same = self.text_positions is self.position_ids
        return Tokens(
            hidden=gather_columns(self.hidden, order),
            position_ids=positions,
            text_positions=positions if same else gather_positions(self.text_positions, order),
            valid=there,
            keep=there if self.keep is self.valid else gather_columns(self.keep, order) & there,
            counts=counts,
            columns=torch.where(there, columns, -1),
            layout=replace(layout, counts=tuple(counts)),
            deepstack=tuple(gather_columns(level, order) for level in self.deepstack),
        )


def packed_columns(present: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [B, n] columns of the present tokens packed to the right (anything before), and bool [B, n] which are."""
    width = max(counts)
    order = packing_order(present, width)
    if min(counts) == width:
        return order, torch.ones_like(order, dtype=torch.bool)
    slot = torch.arange(width, device=present.device) - (
        width - present.sum(1, keepdim=True)
    )  # < 0 on padding
    return order.gather(1, slot.clamp(min=0)), slot >= 0


def present_tokens(
    decision: Decision, tokens: Tokens, last_only: bool
) -> tuple[torch.Tensor, Sequence[int] | None]:
    """Return bool [B, L], the tokens that layers behind a gate compute, and their counts where the host knows.

    A dropped output token still predicts its successor; with `last_only` no one asks for it, save the last. A dropped image
    token predicts nothing: what follows a prompt that ends in one is predicted from the last token that stays.
    """
    if tokens.layout.output_mask is None:
        return decision.keep, decision.counts
    predicts = tokens.layout.output_mask & (last_column(tokens.valid) if last_only else tokens.valid)
    return decision.keep | predicts, None


def last_column(valid: torch.Tensor) -> torch.Tensor:
    """Return bool [B, L], True at each sample's last real token."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    return columns == torch.where(valid, columns, -1).amax(1, keepdim=True)


def shorter_layout(layout: TokenLayout, order: torch.Tensor, there: torch.Tensor) -> TokenLayout:
    """Return the layout of the tokens at `order` int64 [B, n], of which those that are `there` bool [B, n] are real."""
    output = None if layout.output_mask is None else gather_columns(layout.output_mask, order) & there
    # Rows are packed to the right: an output token is no farther from their end than before.
    length = 0 if layout.output_mask is None else layout.output_mask.shape[1]
    start = max(0, layout.output_start - (length - order.shape[1]))
    watched = None if layout.watched is None else gather_columns(layout.watched, order) & there
    if layout.image_mask is None:
        return TokenLayout(output_mask=output, output_start=start)
    image_mask = gather_columns(layout.image_mask, order) & there
    numbers = torch.full(layout.image_mask.shape, -1, device=order.device)
    of_image = torch.arange(len(layout.image_lengths), device=order.device)
    lengths = torch.tensor(layout.image_lengths, device=order.device)
    numbers.view(-1)[layout.image_index] = of_image.repeat_interleave(lengths)
    left = torch.where(image_mask, gather_columns(numbers, order), len(lengths))
    held = torch.bincount(left.flatten(), minlength=len(lengths) + 1)[: len(lengths)].tolist()
    return TokenLayout(
        image_mask=image_mask,
        image_lengths=tuple(held),
        image_rows=layout.image_rows,
        image_index=image_mask.flatten().nonzero()[:, 0],
        image_seeds=layout.image_seeds,
        image_totals=layout.image_totals or layout.image_lengths,
        output_mask=output,
        output_start=start,
        watched=watched,
    )


def gather_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return [B, L', ...] of `values` [B or 1, L, ...] at `columns` int64 [B, L'] (-1 gives column 0)."""
    index = columns.clamp(min=0)
    values = values.expand(len(index), *values.shape[1:])
    return values.gather(
        1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])
    )


def gather_positions(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return [..., B, L'] of `values` [..., B or 1, L] at `columns` int64 [B, L']."""
    values = values.expand(*values.shape[:-2], len(columns), values.shape[-1])
    return values.gather(-1, columns.expand(*values.shape[:-2], *columns.shape))


def at_columns(values: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
    """Return [B, length] with the last n `values` [B, n] in their `columns` int64 [B, L'] (-1 is none), 0 elsewhere."""
    columns = columns[:, columns.shape[1] - values.shape[1] :]
    spread = values.new_zeros(len(values), length + 1)  # the last column takes what belongs nowhere
    return spread.scatter_(1, columns.masked_fill(columns < 0, length), values)[:, :length]
