"""What the decoder, the model and scoring return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from dynllava_plugin.model.gate import Decision, TrainingMasks


@dataclass
class SparseDecoderOutput(BaseModelOutputWithPast):
    """Hidden states and what the gate decided.

    `token_index` int64 [B, L'] is the column of the input each hidden state belongs to, -1 on padding: samples that lose
    tokens are packed to the right. `decision` is set at inference, `masks` in training.
    """

    token_index: torch.Tensor | None = None
    decision: Decision | None = None
    masks: TrainingMasks | None = None


@dataclass
class DynamicLlavaOutput(LlavaCausalLMOutputWithPast):
    """Logits, losses and decisions of one call.

    Parameters
    ----------
    loss : scalar
        lm_loss + lambda * (image_keep_loss + text_keep_loss) in training; lm_loss in evaluation.
    lm_loss, image_keep_loss, text_keep_loss : scalar
        Keep losses without lambda, in training only.
    logits : [B, L', V]
        L' = L in training; at inference without the dropped image tokens, packed to the right.
    token_index : int64 [B, L']
        The input column of each hidden state, -1 on padding; `logits` are those of its last columns where `logits_to_keep`
        asked for few. None in training.
    image_keep : bool [B, N_img]
        Image tokens that stay, right padded over samples; None without images or in mode "full".
    text_keep : bool [B, T]
        Output tokens that stay as context; at inference T counts from the first output column of the batch.
    image_score, text_score : float [B, N_img], [B, T]
        At inference how much each token spoke for staying, on the policy's own scale; None where it has none.
    """

    lm_loss: torch.Tensor | None = None
    image_keep_loss: torch.Tensor | None = None
    text_keep_loss: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    image_keep: torch.Tensor | None = None
    text_keep: torch.Tensor | None = None
    image_score: torch.Tensor | None = None
    text_score: torch.Tensor | None = None


@dataclass
class ScoreDetails:
    """Scores of given text, each field over the input's columns.

    Parameters
    ----------
    log_probs : float32 [B, L]
        Of each label; 0 where the label is -100.
    greedy : bool [B, L]
        Where the label is the most probable token.
    image_keep : bool [B, N_img]
        Image tokens that stay, right padded; None without images or in mode "full".
    text_keep : bool [B, L]
        Output tokens that stay as context.
    """

    log_probs: torch.Tensor
    greedy: torch.Tensor
    image_keep: torch.Tensor | None
    text_keep: torch.Tensor
