"""The gate at layer l: from hidden states and the place of images and output text to what stays as context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.predictors import ImagePredictor, TextPredictor
from dynllava_plugin.sparsity.selection import (
    gumbel_keep_mask,
    gumbel_noise,
    keep_score,
    random_image_scores,
    select_image_tokens,
    select_text_tokens,
)


@dataclass
class TokenLayout:
    """Which tokens of a forward call are what.

    Parameters
    ----------
    image_mask : bool [B, L], optional
        Image tokens, `tokens_per_image` consecutive ones an image; None where the call has no image.
    output_mask : bool [B, L], optional
        Output text, the only text that may be dropped; None where the call has none.
    output_start : int
        First column that holds output text in any sample.
    image_seeds : list of int, optional
        One an image, for the random control.
    """

    image_mask: torch.Tensor | None = None
    tokens_per_image: int = 0
    output_mask: torch.Tensor | None = None
    output_start: int = 0
    image_seeds: list[int] | None = None


@dataclass
class Decision:
    """What stays: `keep` bool [B, L] over the call's tokens, and the same by kind, right padded with False."""

    keep: torch.Tensor
    image_keep: torch.Tensor | None = None  # [B, N_img]
    text_keep: torch.Tensor | None = None  # [B, L - output_start]


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


def decide(
    hidden: torch.Tensor,
    valid: torch.Tensor,
    layout: TokenLayout,
    sparsity: SparsityConfig,
    image_predictor: ImagePredictor,
    text_predictor: TextPredictor | None,
) -> Decision:
    """Inference: hidden states [B, L, d] entering layer l, `valid` bool [B, L] (False on padding)."""
    decision = Decision(keep=valid)
    if layout.image_mask is not None and sparsity.mode != "full":
        tokens = hidden[layout.image_mask].view(-1, layout.tokens_per_image, hidden.shape[-1])  # [M, N, d]
        if layout.image_seeds is None:
            scores = keep_score(image_predictor(tokens))
        else:
            scores = random_image_scores(layout.image_seeds, layout.tokens_per_image, hidden.device)
        selected = select_image_tokens(scores, sparsity.vision_keep_rate).flatten()
        decision.keep = decision.keep.masked_scatter(layout.image_mask, selected)
        decision.image_keep = right_padded(selected, layout.image_mask)[0]
    if layout.output_mask is not None:
        output_mask = layout.output_mask[:, layout.output_start :]
        stays = output_mask & valid[:, layout.output_start :]
        if sparsity.mode == "image_text" and text_predictor is not None:
            stays = stays & select_text_tokens(text_predictor(hidden[:, layout.output_start :]))
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
