"""Gates: asking the policy what stays, and packing the tokens of a ragged batch that go on to the next segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dynllava_plugin.model.outputs import Decision
from dynllava_plugin.model.token_layout import token_positions
from dynllava_plugin.policies import Gate, Policy, TokenLayout
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.selection import pick
from dynllava_plugin.sparsity.tracks import packing_order


@dataclass(frozen=True)
class Tokens:
    """What is present in a segment."""

    hidden: torch.Tensor  # [B, L, d]
    position_ids: torch.Tensor  # int64 [B or 1, L], or [3, B, L] where images turn on three axes
    # int64 [B or 1, L], places in the text: `position_ids` where those are the same
    text_positions: torch.Tensor
    valid: torch.Tensor  # bool [B, L], False on padding
    keep: torch.Tensor  # bool [B, L], tokens that later ones may see
    counts: Sequence[int] | None  # real tokens of each sample, where the host knows
    columns: torch.Tensor | None  # int64 [B, L], input columns, -1 on padding; None while they are as given
    layout: TokenLayout  # of these tokens
    deepstack: tuple[torch.Tensor, ...] = ()  # [B, L, d] each, still to be added behind the next layers
    entered: torch.Tensor | None = None  # [B, L, d], what entered the last layer that was run

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        valid: torch.Tensor,
        cache: SparseContextCache | None,
        layout: TokenLayout,
        deepstack: tuple[torch.Tensor, ...] = (),
    ) -> Tokens:
        """Return the tokens of a call as they enter a decoder; the arguments are its and `valid_columns`'s answer."""
        text, turned = token_positions(attention_mask, position_ids, valid, cache)
        return cls(hidden, turned, text, valid, valid, layout.counts, None, layout, deepstack)

    @property
    def keep_counts(self) -> Sequence[int] | None:
        """Return `keep`'s counts, where the host knows."""
        return self.counts if self.keep is self.valid else None

    @property
    def token_index(self) -> torch.Tensor:
        """Return int64 [B, L], the input column of each token, -1 on padding."""
        if self.columns is not None:
            return self.columns
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return torch.where(self.valid, columns, -1)

    def behind(self, gone: torch.Tensor) -> Tokens:
        """Return the tokens, whose positions are their places in the text, with those less by `gone` int64 [B, 1 or L]."""
        positions = self.position_ids - gone
        return replace(self, position_ids=positions, text_positions=positions)

    def first(self, order: torch.Tensor, lengths: torch.Tensor) -> Tokens:
        """Return the tokens at `order` int64 [B, n], of which the first `lengths` int64 [B] are real; without a layout."""
        there = torch.arange(order.shape[1], device=order.device) < lengths[:, None]
        return self._at(order, valid=there, keep=there, layout=TokenLayout())

    def packed(self, present: torch.Tensor, counts: Sequence[int], layout_too: bool) -> Tokens:
        """Return the tokens that are `present` bool [B, L], `counts` of each sample, packed to the right.

        `layout_too` says whether a later gate will ask where images and output text are.
        """
        order, there = packed_columns(present, counts)
        columns = order if self.columns is None else pick(self.columns, order)
        layout = shorter_layout(self.layout, order, there) if layout_too else TokenLayout()
        return self._at(
            order,
            valid=there,
            keep=there if self.keep is self.valid else pick(self.keep, order) & there,
            counts=counts,
            columns=torch.where(there, columns, -1),
            layout=replace(layout, counts=tuple(counts)),
        )

    def _at(self, order: torch.Tensor, counts: Any = None, columns: Any = None, **facts: Any) -> Tokens:
        """Return the tokens at `order` int64 [B, n], with what else is known of them."""
        positions, same = gather_positions(self.position_ids, order), self.text_positions is self.position_ids
        return Tokens(
            pick(self.hidden, order),
            positions,
            positions if same else gather_positions(self.text_positions, order),
            counts=counts,
            columns=columns,
            deepstack=tuple(pick(level, order) for level in self.deepstack),
            **facts,
        )


def packed_columns(present: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [B, n] columns of the present tokens packed to the right (anything before), and bool [B, n] which are."""
    width = max(counts)
    order = packing_order(present, width)
    if min(counts) == width:
        return order, torch.ones_like(order, dtype=torch.bool)
    padding = width - present.sum(1, keepdim=True)
    slot = torch.arange(width, device=present.device) - padding  # < 0 on padding
    return order.gather(1, slot.clamp(min=0)), slot >= 0


def last_column(valid: torch.Tensor) -> torch.Tensor:
    """Return bool [B, L], True at each sample's last real token."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    return columns == torch.where(valid, columns, -1).amax(1, keepdim=True)


def shorter_layout(layout: TokenLayout, order: torch.Tensor, there: torch.Tensor) -> TokenLayout:
    """Return the layout of the tokens at `order` int64 [B, n], of which those that are `there` bool [B, n] are real."""
    output = None if layout.output_mask is None else pick(layout.output_mask, order) & there
    # Rows are packed to the right: an output token is no farther from their end than before.
    length = 0 if layout.output_mask is None else layout.output_mask.shape[1]
    start = max(0, layout.output_start - (length - order.shape[1]))
    watched = None if layout.watched is None else pick(layout.watched, order) & there
    if layout.image_mask is None:
        return TokenLayout(output_mask=output, output_start=start)
    image_mask = pick(layout.image_mask, order) & there
    numbers = torch.full(layout.image_mask.shape, -1, device=order.device)
    of_image = torch.arange(len(layout.image_lengths), device=order.device)
    lengths = torch.tensor(layout.image_lengths, device=order.device)
    numbers.view(-1)[layout.image_index] = of_image.repeat_interleave(lengths)
    left = torch.where(image_mask, pick(numbers, order), len(lengths))
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


def gather_positions(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return [..., B, L'] of `values` [..., B or 1, L] at `columns` int64 [B, L']."""
    values = values.expand(*values.shape[:-2], len(columns), values.shape[-1])
    return values.gather(-1, columns.expand(*values.shape[:-2], *columns.shape))


def at_columns(values: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
    """Return [B, length] with the last n `values` [B, n] in their `columns` int64 [B, L'] (-1 is none), 0 elsewhere."""
    columns = columns[:, columns.shape[1] - values.shape[1] :]
    spread = values.new_zeros(len(values), length + 1)  # the last column takes what belongs nowhere
    return spread.scatter_(1, columns.masked_fill(columns < 0, length), values)[:, :length]


def segment_ends(policy: Policy, layers: int) -> tuple[int, ...]:
    """Return where segments of a model's `layers` end: at each gate, where a cache's track begins, and behind the last layer."""
    return (*sorted({*policy.layers, *policy.splits}), layers)


def decide(policy: Policy, gate: Gate, keep: torch.Tensor, counts: Sequence[int] | None) -> Decision:
    """Return what `policy` keeps of the tokens at the gate, of which `keep` bool [B, L], without padding, stayed so far.

    `counts` are how many of each sample, where the host knows.
    """
    layout = gate.layout
    decision = Decision(keep=keep, counts=counts)
    if layout.question is not None and policy.prompt is not None and gate.layer in policy.prompt.layers:
        decision.keep, decision.counts = keep & policy.prompt.keep_prompt(gate), None
    if layout.image_lengths:
        _decide_images(policy, gate, decision)
    if layout.output_mask is not None:
        output_mask = gate.of_output(layout.output_mask)
        stays = output_mask & gate.of_output(gate.valid)
        output = policy.keep_output(gate)
        if output is not None:
            stays, decision.text_score = stays & output.keep, output.score
        decision.text_keep, decision.counts = stays, None
        decision.keep = decision.keep.clone()
        decision.keep[:, layout.output_start :] &= stays | ~output_mask
    return decision


def _decide_images(policy: Policy, gate: Gate, decision: Decision) -> None:
    """Add what the policy keeps of the call's images, asked about in groups of one number of tokens."""
    layout = gate.layout
    groups = layout.image_groups()
    choices = [policy.keep_image(gate.of_group(images)) for _, images in groups]
    first = choices[0]
    if first is None:
        return
    known = [choice for choice in choices if choice is not None]

    def of_all(values: list[torch.Tensor]) -> torch.Tensor:
        return in_order([images for _, images in groups], values)

    selected = of_all([choice.keep for choice in known])
    decision.image_keep = by_sample(selected, layout)
    if first.score is not None:
        decision.image_score = by_sample(of_all([choice.score for choice in known]), layout)  # type: ignore[misc]
    if first.tokens is not None:
        decision.image_states = of_all([choice.tokens for choice in known])  # type: ignore[misc]
    decision.keep = decision.keep.masked_scatter(layout.image_mask, selected)  # type: ignore[arg-type]
    left = decision.counts
    if left is None or any(choice.count is None for choice in known):
        decision.counts = None
        return
    counts = list(left)
    for (length, images), choice in zip(groups, known, strict=True):
        for image in images:
            counts[layout.image_rows[image]] -= length - choice.count  # type: ignore[operator]
    decision.counts = counts


def by_sample(values: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Return [B, N_img] of values [T] of a call's image tokens, right padded with 0."""
    counts = layout.image_counts()
    if min(counts) == max(counts):
        return values.view(len(counts), counts[0])
    return right_padded(values, counts)[0]


def right_padded(values: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [T], `counts` of each sample, as [B, n], right padded with 0, and bool [B, n], the real ones."""
    there = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(values.device)
    return values.new_zeros(there.shape).masked_scatter(there, values), there


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


def by_input_columns(decision: Decision, tokens: Tokens, layout: TokenLayout, length: int) -> Decision:
    """Return a later gate's decision as one on the call's own columns."""
    if tokens.columns is None:
        return decision
    for name in ("text_keep", "text_score"):
        if (value := getattr(decision, name)) is not None:
            spread = at_columns(value, tokens.columns, length)
            setattr(decision, name, spread[:, layout.output_start :])
    if decision.image_keep is not None:
        stays = at_columns(decision.keep, tokens.columns, length)
        decision.image_keep = by_sample(stays.flatten()[layout.image_index], layout)
        decision.image_score = None  # on the scale of this gate's own survivors
    return decision


def whole(decisions: list[Decision], valid: torch.Tensor, layout: TokenLayout) -> Decision:
    """Return one call's decisions over all gates: what the last gate that decided on a kind of token left."""
    found = Decision(keep=valid)
    for decision in decisions:
        found.keep = decision.keep
        for name in ("image_keep", "image_score", "text_keep", "text_score"):
            value = getattr(decision, name)
            if value is not None:
                setattr(found, name, value)
    if found.text_keep is None and layout.output_mask is not None:
        output = layout.output_mask[:, layout.output_start :]
        found.text_keep = output & valid[:, layout.output_start :]
    return found


def in_order(groups: list[list[int]], values: list[torch.Tensor]) -> torch.Tensor:
    """Return values [M, N, ...] of each group's images as [T, ...] in the order of places."""
    if len(groups) == 1:
        return values[0].flatten(0, 1)
    parts: dict[int, torch.Tensor] = {}
    for images, of_group in zip(groups, values, strict=True):
        parts.update(zip(images, of_group, strict=True))
    return torch.cat([parts[image] for image in range(len(parts))])
