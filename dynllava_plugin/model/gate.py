"""What a gate decides, in inference by asking the policy and, for the learned one, in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dynllava_plugin.policies import Gate, Policy, TokenLayout
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.predictors import ImagePredictor, TextPredictor
from dynllava_plugin.sparsity.selection import gumbel_keep_mask, gumbel_noise


@dataclass
class Decision:
    """What stays: `keep` bool [B, L] over the call's tokens, and the same by kind, right padded with False.

    Scores are the policy's own, on any scale; None where it has none. `counts` are `keep`'s, where the host knows;
    `image_states` [T, d] are the image tokens' states where the policy merges some.
    """

    keep: torch.Tensor
    counts: Sequence[int] | None = None
    image_keep: torch.Tensor | None = None  # [B, N_img]
    text_keep: torch.Tensor | None = None  # [B, L - output_start]
    image_score: torch.Tensor | None = None
    text_score: torch.Tensor | None = None
    image_states: torch.Tensor | None = None


@dataclass
class TrainingMasks:
    """Straight-through masks: `keep` float [B, L] for Eq. 7, and by kind for the keep losses (Eq. 10)."""

    keep: torch.Tensor
    # Behind each gate: masks [B, N_img], valid, and the share of the image that is to stay, of all samples or [B].
    images: list[tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]] = field(default_factory=list)
    text: tuple[torch.Tensor, torch.Tensor] | None = None  # masks [B, longest answer], valid
    text_counted: torch.Tensor | None = None  # [B] answers of at least LEN_OT tokens


def right_padded(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, ...] values of the T True places of `mask` [B, L] -> ([B, n, ...] right padded with 0, valid bool [B, n])."""
    counts = mask.sum(1)
    valid = torch.arange(int(counts.max()), device=mask.device) < counts[:, None]
    rows = values.new_zeros(*valid.shape, *values.shape[1:])
    rows[valid] = values
    return rows, valid


def decide(policy: Policy, gate: Gate, keep: torch.Tensor, counts: Sequence[int] | None) -> Decision:
    """Return what `policy` keeps of the tokens at the gate.

    Parameters
    ----------
    keep : bool [B, L]
        What stayed so far; padding isn't in it.
    counts : sequence of int, optional
        How many of each sample, where the host knows.
    """
    layout = gate.layout
    decision = Decision(keep=keep, counts=counts)
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
        return _in_order([images for _, images in groups], values)

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
    assert layout.image_mask is not None
    counts = [0] * len(layout.image_mask)
    for row, length in zip(layout.image_rows, layout.image_lengths, strict=True):
        counts[row] += length
    width = max(counts)
    if min(counts) == width:
        return values.view(len(counts), width)
    there = torch.arange(width) < torch.tensor(counts)[:, None]
    rows = values.new_zeros(there.shape)
    return rows.masked_scatter(there.to(values.device), values)


def mask_images(
    masks: TrainingMasks,
    hidden: torch.Tensor,
    layout: TokenLayout,
    predictor: ImagePredictor,
    share: float | torch.Tensor,
    tau: float,
    noise: torch.Tensor | None,
) -> None:
    """Add a gate's Gumbel masks of the image tokens, for the hidden states [B, L, d] that reach it.

    `share` of the whole image is to stay, of all samples or float [B]; `noise` is [B, N_img, 2], drawn where None.
    """
    if layout.image_mask is None:
        return
    earlier = masks.keep.flatten()[layout.image_index] if masks.images else None
    logits = _image_logits(hidden, layout, predictor, share, earlier)
    flat = _gumbel(logits, layout.image_mask, noise, tau)
    flat = flat if earlier is None else flat * earlier
    masks.keep = masks.keep.masked_scatter(layout.image_mask, flat)
    masks.images.append((*right_padded(flat, layout.image_mask), share))


def mask_output(
    masks: TrainingMasks,
    hidden: torch.Tensor,
    layout: TokenLayout,
    sparsity: SparsityConfig,
    predictor: TextPredictor | None,
    tau: float,
    noise: torch.Tensor | None,
) -> None:
    """Add the Gumbel masks of the output text; `noise` is [B, longest answer, 2], drawn where None."""
    if layout.output_mask is None or sparsity.mode != "image_text" or predictor is None:
        return
    lengths = layout.output_mask.sum(1)
    masks.text_counted = (lengths >= sparsity.min_text_length) & (lengths > 0)
    flat = _gumbel(predictor(hidden[layout.output_mask]), layout.output_mask, noise, tau)
    # Short answers are kept whole; the product keeps the predictor in the graph, which DDP asks for.
    flat = torch.where(spread_over_tokens(layout.output_mask, masks.text_counted), flat, flat * 0 + 1)
    masks.keep = masks.keep.masked_scatter(layout.output_mask, flat)
    masks.text = right_padded(flat, layout.output_mask)


def _image_logits(
    hidden: torch.Tensor,
    layout: TokenLayout,
    predictor: ImagePredictor,
    share: float | torch.Tensor,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """[T, 2] logits of the call's image tokens, of which `keep` [T] are left (None: all); each image is seen alone."""
    gate = Gate(hidden, hidden, hidden, layout)
    tokens = hidden.flatten(0, 1)[layout.image_index]
    shares = torch.as_tensor(share, dtype=torch.float32, device=hidden.device).expand(len(hidden))
    if not layout.image_lengths:  # a stand-in image: through the predictor, to no place
        return predictor(tokens[:, None], shares[:0]).flatten(0, 1)
    groups, found = [images for _, images in layout.image_groups()], []
    for images in groups:
        of_group = gate.of_group(images)
        present = None if keep is None else of_group.in_question(keep.detach() > 0.5)
        rates = shares[[layout.image_rows[image] for image in images]]
        found.append(predictor(of_group.in_question(tokens), rates, present))
    return _in_order(groups, found)


def _in_order(groups: list[list[int]], values: list[torch.Tensor]) -> torch.Tensor:
    """Values [M, N, ...] of each group's images -> [T, ...] in the order of places."""
    if len(groups) == 1:
        return values[0].flatten(0, 1)
    parts: dict[int, torch.Tensor] = {}
    for images, of_group in zip(groups, values, strict=True):
        parts.update(zip(images, of_group, strict=True))
    return torch.cat([parts[image] for image in range(len(parts))])


def spread_over_tokens(mask: torch.Tensor, per_sample: torch.Tensor) -> torch.Tensor:
    """[B] values repeated for each True of `mask` [B, L], flattened: [T]."""
    return per_sample[:, None].expand_as(mask)[mask]


def _gumbel(logits: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor | None, tau: float) -> torch.Tensor:
    if noise is None:
        drawn = gumbel_noise(logits.shape, logits.device)
    else:
        counts = mask.sum(1)
        drawn = noise[torch.arange(noise.shape[1], device=noise.device) < counts[:, None]]
    return gumbel_keep_mask(logits, drawn, tau)
