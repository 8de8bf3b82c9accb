"""The gate: asks the policy what stays as context, in inference and, for the learned one, in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.policies import Gate, Policy, TokenLayout
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.predictors import ImagePredictor, TextPredictor
from dynllava_plugin.sparsity.selection import gumbel_keep_mask, gumbel_noise


@dataclass
class Decision:
    """What stays: `keep` bool [B, L] over the call's tokens, and the same by kind, right padded with False.

    Scores are the policy's own, on any scale; None where it has none.
    """

    keep: torch.Tensor
    image_keep: torch.Tensor | None = None  # [B, N_img]
    text_keep: torch.Tensor | None = None  # [B, L - output_start]
    image_score: torch.Tensor | None = None
    text_score: torch.Tensor | None = None

    def add_removed(self, layout: TokenLayout) -> None:
        """What was decided before the LLM, if anything was."""
        if layout.removed is None:
            return
        self.image_keep = right_padded(~layout.removed[layout.image_mask], layout.image_mask)[0]
        if layout.image_score is not None:
            self.image_score = right_padded(layout.image_score.flatten(), layout.image_mask)[0]


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


def decide(policy: Policy, gate: Gate) -> Decision:
    """Inference: what `policy` keeps of the tokens at the gate; padding is never kept."""
    layout, valid = gate.layout, gate.valid
    decision = Decision(keep=valid)
    image = policy.keep_image(gate) if layout.image_mask is not None else None
    if image is not None:
        selected = image.keep.flatten()
        decision.keep = decision.keep.masked_scatter(layout.image_mask, selected)
        decision.image_keep = right_padded(selected, layout.image_mask)[0]
        if image.score is not None:
            decision.image_score = right_padded(image.score.flatten(), layout.image_mask)[0]
    if layout.output_mask is not None:
        output_mask = gate.of_output(layout.output_mask)
        stays = output_mask & gate.of_output(valid)
        output = policy.keep_output(gate)
        if output is not None:
            stays, decision.text_score = stays & output.keep, output.score
        decision.text_keep = stays
        decision.keep = decision.keep.clone()
        decision.keep[:, layout.output_start :] &= stays | ~output_mask
    return decision


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
        tokens = hidden[layout.image_mask].view(-1, layout.tokens_per_image, hidden.shape[-1])
        flat = _gumbel(image_predictor(tokens).flatten(0, 1), layout.image_mask, image_noise, tau)
        masks.keep = masks.keep.masked_scatter(layout.image_mask, flat)
        masks.image = right_padded(flat, layout.image_mask)
    if layout.output_mask is not None and sparsity.mode == "image_text" and text_predictor is not None:
        lengths = layout.output_mask.sum(1)
        masks.text_counted = (lengths >= sparsity.min_text_length) & (lengths > 0)
        flat = _gumbel(text_predictor(hidden[layout.output_mask]), layout.output_mask, text_noise, tau)
        # Short answers are kept whole; the product keeps the predictor in the graph, which DDP asks for.
        flat = torch.where(spread_over_tokens(layout.output_mask, masks.text_counted), flat, flat * 0 + 1)
        masks.keep = masks.keep.masked_scatter(layout.output_mask, flat)
        masks.text = right_padded(flat, layout.output_mask)
    return masks


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
