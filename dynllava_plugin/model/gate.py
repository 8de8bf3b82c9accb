"""What a gate decides, in inference by asking the policy and, for the learned one, in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynllava_plugin.model.packing import Tokens, at_columns, last_column
from dynllava_plugin.policies import Gate, Policy, TokenLayout
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.selection import ImagePredictor, TextPredictor, gumbel_keep_mask, gumbel_noise


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
    image: tuple[torch.Tensor, torch.Tensor] | None = None  # masks [B, N_img], valid
    text: tuple[torch.Tensor, torch.Tensor] | None = None  # masks [B, longest answer], valid
    text_counted: torch.Tensor | None = None  # [B] answers of at least LEN_OT tokens


def right_padded(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, ...] values of the T True places of `mask` [B, L] -> ([B, n, ...] right padded with 0, valid bool [B, n])."""
    counts = mask.sum(1)
    valid = torch.arange(int(counts.max()), device=mask.device) < counts[:, None]
    rows = values.new_zeros(*valid.shape, *values.shape[1:])
    rows[valid] = values
    return rows, valid


def segment_ends(policy: Policy, layers: int) -> tuple[int, ...]:
    """Return where segments of a model's `layers` end: at each gate, where a cache's track begins, and behind the last layer."""
    return (*sorted({*policy.layers, *policy.splits}), layers)


def decide(policy: Policy, gate: Gate, keep: torch.Tensor, counts: Sequence[int] | None) -> Decision:
    """Return what `policy` keeps of the tokens at the gate, of which `keep` bool [B, L], without padding, stayed so far.

    `counts` are how many of each sample, where the host knows.
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
    """A later gate's decision as one on the call's own columns."""
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
    """One call's decisions over all gates: what the last gate that decided on a kind of token left."""
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


def decide_training(
    hidden: torch.Tensor,
    layout: TokenLayout,
    sparsity: SparsityConfig,
    image_predictor: ImagePredictor,
    text_predictor: TextPredictor | None,
    tau: float,
    noise: tuple[torch.Tensor | None, torch.Tensor | None],
) -> TrainingMasks:
    """Gumbel masks for hidden states [B, L, d]; `noise` is image [B, N_img, 2] and text [B, longest answer, 2], drawn where None."""
    masks = TrainingMasks(keep=torch.ones(hidden.shape[:2], dtype=torch.float32, device=hidden.device))
    image_noise, text_noise = noise
    if layout.image_mask is not None:
        flat = _gumbel(_image_logits(hidden, layout, image_predictor), layout.image_mask, image_noise, tau)
        masks.keep = masks.keep.masked_scatter(layout.image_mask, flat)
        masks.image = right_padded(flat, layout.image_mask)
    if layout.output_mask is not None and sparsity.mode == "image_text" and text_predictor is not None:
        lengths = layout.output_mask.sum(1)
        masks.text_counted = (lengths >= sparsity.min_text_length) & (lengths > 0)
        flat = _gumbel(text_predictor(hidden[layout.output_mask]), layout.output_mask, text_noise, tau)
        # Short answers are kept whole; the product keeps the predictor in the graph, which DDP asks for.
        counted = masks.text_counted[:, None].expand_as(layout.output_mask)[layout.output_mask]
        flat = torch.where(counted, flat, flat * 0 + 1)
        masks.keep = masks.keep.masked_scatter(layout.output_mask, flat)
        masks.text = right_padded(flat, layout.output_mask)
    return masks


def _image_logits(hidden: torch.Tensor, layout: TokenLayout, predictor: ImagePredictor) -> torch.Tensor:
    """[T, 2] logits of the call's image tokens; each image is seen alone."""
    gate = Gate(hidden, hidden, hidden, layout)
    tokens = hidden.flatten(0, 1)[layout.image_index]
    if not layout.image_lengths:  # a stand-in image: through the predictor, to no place
        return predictor(tokens[:, None]).flatten(0, 1)
    groups = [images for _, images in layout.image_groups()]
    return _in_order(groups, [predictor(gate.of_group(images).in_question(tokens)) for images in groups])


def _in_order(groups: list[list[int]], values: list[torch.Tensor]) -> torch.Tensor:
    """Values [M, N, ...] of each group's images -> [T, ...] in the order of places."""
    if len(groups) == 1:
        return values[0].flatten(0, 1)
    parts: dict[int, torch.Tensor] = {}
    for images, of_group in zip(groups, values, strict=True):
        parts.update(zip(images, of_group, strict=True))
    return torch.cat([parts[image] for image in range(len(parts))])


def _gumbel(logits: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor | None, tau: float) -> torch.Tensor:
    if noise is None:
        drawn = gumbel_noise(logits.shape, logits.device)
    else:
        counts = mask.sum(1)
        drawn = noise[torch.arange(noise.shape[1], device=noise.device) < counts[:, None]]
    return gumbel_keep_mask(logits, drawn, tau)
