"""The training loss, put together (Eq. 8 to 10)."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from dynllava_plugin.model.outputs import DynamicLlavaOutput, SparseDecoderOutput
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.objective import keep_loss, lm_loss

IGNORE_INDEX = -100


def training_output(
    logits: torch.Tensor,
    outputs: SparseDecoderOutput,
    sparsity: SparsityConfig,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> DynamicLlavaOutput:
    """[B, L, V] logits with the objective: lm_loss + lambda * (image_keep_loss + text_keep_loss), Eq. 8 to 10."""
    result = DynamicLlavaOutput(logits=logits)
    masks = outputs.masks
    if masks is not None and masks.image is not None:
        values, valid = masks.image
        result.image_keep = values.detach() > 0.5
        result.image_keep_loss = keep_loss(values, valid, valid.any(1), sparsity.vision_keep_rate)
    if masks is not None and masks.text is not None:
        values, valid = masks.text
        result.text_keep = values.detach() > 0.5
        result.text_keep_loss = keep_loss(values, valid, masks.text_counted, sparsity.text_keep_rate)
    if labels is not None:
        result.lm_loss = lm_loss(logits, labels, num_items_in_batch)
        result.loss = result.lm_loss
        for term in (result.image_keep_loss, result.text_keep_loss):
            if term is not None:
                result.loss = result.loss + sparsity.keep_loss_weight * term
    return result


def labels_at(labels: torch.Tensor, token_index: torch.Tensor) -> torch.Tensor:
    """[B, L] labels -> [B, L'] labels of the tokens that are still there."""
    nothing_before = pad(token_index[:, :-1] < 0, (1, 0))  # what padding "predicts" is no loss
    return labels.gather(1, token_index.clamp(min=0)).masked_fill(
        (token_index < 0) | nothing_before, IGNORE_INDEX
    )
