"""What scoring returns beside the log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
