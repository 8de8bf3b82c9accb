"""What gates, the decoder and the model return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast


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
    tau: float  # the temperature of Eq. 11
    # Behind each gate: masks [B, N_img], valid, and the share of the image that is to stay, of all samples or float [B].
    images: list[tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]] = field(default_factory=list)
    # Of "text", the answers, and "prompt", the questions: masks [B, longest], valid, and bool [B], those long enough to count.
    texts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)


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

    `loss` is lm_loss + lambda * (image_keep_loss + text_keep_loss + prompt_keep_loss) in training, where alone the keep losses
    (without lambda) are set; lm_loss else. `logits` [B, L', V] have L' = L in training; at inference they are without the
    dropped image tokens, packed to the right, and `token_index` int64 [B, L'] is the input column of each, -1 on padding (of
    the last columns only where `logits_to_keep` asked for few). `image_keep` bool [B, N_img] tells the image tokens that stay,
    right padded over samples, None without images or in mode "full"; `text_keep` bool [B, T] the output tokens that stay as
    context, at inference from the first output column of the batch on. `image_score` and `text_score`, of the same shapes, are
    at inference how much each token spoke for staying, on the policy's own scale; None where it has none.
    """

    image_hidden_states: Any = None  # each image's features, as placed
    lm_loss: torch.Tensor | None = None
    image_keep_loss: torch.Tensor | None = None
    text_keep_loss: torch.Tensor | None = None
    prompt_keep_loss: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    prompt_keep: torch.Tensor | None = None  # training: bool [B, longest question]
    image_keep: torch.Tensor | None = None
    text_keep: torch.Tensor | None = None
    image_score: torch.Tensor | None = None
    text_score: torch.Tensor | None = None
