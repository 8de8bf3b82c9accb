"""From a call's outputs and labels to losses and scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from dynllava_plugin.model.gate import TrainingMasks
from dynllava_plugin.model.outputs import DynamicLlavaOutput, ScoreDetails, SparseDecoderOutput
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.objective import keep_loss, label_log_probs, lm_loss

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
    if outputs.masks is not None:
        _add_keep_losses(result, outputs.masks, sparsity)
    if labels is not None:
        result.lm_loss = lm_loss(logits, labels, num_items_in_batch)
        result.loss = result.lm_loss
        for term in (result.image_keep_loss, result.text_keep_loss):
            if term is not None:
                result.loss = result.loss + sparsity.keep_loss_weight * term
    return result


def _add_keep_losses(result: DynamicLlavaOutput, masks: TrainingMasks, sparsity: SparsityConfig) -> None:
    for values, valid, share in masks.images:  # of several gates: their sum, and what is left behind the last
        result.image_keep = values.detach() > 0.5
        loss = keep_loss(values, valid, valid.any(1), share)
        result.image_keep_loss = loss if result.image_keep_loss is None else result.image_keep_loss + loss
    if masks.text is not None:
        values, valid = masks.text
        result.text_keep = values.detach() > 0.5
        result.text_keep_loss = keep_loss(values, valid, masks.text_counted, sparsity.text_keep_rate)


def labels_at(labels: torch.Tensor, token_index: torch.Tensor) -> torch.Tensor:
    """[B, L] labels -> [B, L'] labels of the tokens that are still there."""
    nothing_before = pad(token_index[:, :-1] < 0, (1, 0))  # what padding "predicts" is no loss
    return labels.gather(1, token_index.clamp(min=0)).masked_fill(
        (token_index < 0) | nothing_before, IGNORE_INDEX
    )


def scored(
    outputs: SparseDecoderOutput, labels: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]
) -> ScoreDetails:
    """Log-probabilities of `labels` int64 [B, L]; `project` makes logits of hidden states [n, d], only of those wanted."""
    assert outputs.token_index is not None and outputs.decision is not None
    target = labels_at(labels, outputs.token_index)[:, 1:]
    wanted = target != IGNORE_INDEX
    logits = project(outputs.last_hidden_state[:, :-1][wanted])
    rows = wanted.nonzero()[:, 0]
    columns = outputs.token_index[:, 1:][wanted]
    scores = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    scores[rows, columns] = label_log_probs(logits, target[wanted])
    greedy = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    greedy[rows, columns] = logits.argmax(-1) == target[wanted]
    return ScoreDetails(scores, greedy, outputs.decision.image_keep, outputs.decision.text_keep)
