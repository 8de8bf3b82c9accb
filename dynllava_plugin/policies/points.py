"""What a policy is told at each point where it is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


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
        One an image, for policies that use chance.
    removed : bool [B, L], optional
        Image tokens that don't enter the LLM at all.
    packed_positions : bool
        Whether the tokens behind a removed one move up (as where fewer image tokens are put into the prompt) or
        every token keeps its position id.
    image_score : [M, N], optional
        How much each image token spoke for entering, where `removed` says which did.
    """

    image_mask: torch.Tensor | None = None
    tokens_per_image: int = 0
    output_mask: torch.Tensor | None = None
    output_start: int = 0
    image_seeds: list[int] | None = None
    removed: torch.Tensor | None = None
    packed_positions: bool = False
    image_score: torch.Tensor | None = None

    def before_output(self, columns: torch.Tensor) -> torch.Tensor:
        """bool [L] or [B, L]: which of the call's `columns` int64 [L] come before each sample's first output token."""
        if self.output_mask is None:
            return columns >= 0
        return columns < torch.where(self.output_mask, columns, len(columns)).amin(1, keepdim=True)


@dataclass
class Choice:
    """Tokens that stay, and how much each one speaks for staying (any scale; None where there is no such figure)."""

    keep: torch.Tensor
    score: torch.Tensor | None = None


@dataclass
class Gate:
    """What is known at the gate.

    Parameters
    ----------
    hidden : [B, L, d]
        States that enter the gate's layer.
    valid : bool [B, L]
        False on padding.
    position_ids : int64 [B, L]
        As in the input: the same token has the same one alone, in a batch, with and without a cache.
    layout : TokenLayout
    image_predictor, text_predictor : modules
        The checkpoint's.
    attention : float32 [B, L], optional
        The last prompt token's attention in layer `attention_layer`, mean over heads; None where no one asked.
    """

    hidden: torch.Tensor
    valid: torch.Tensor
    position_ids: torch.Tensor
    layout: TokenLayout
    image_predictor: Any = None
    text_predictor: Any = None
    attention: torch.Tensor | None = None

    def of_images(self, values: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] values -> [M, N, ...] of the M images' N tokens."""
        assert self.layout.image_mask is not None
        chosen = values[self.layout.image_mask]
        return chosen.view(-1, self.layout.tokens_per_image, *values.shape[2:])

    def of_output(self, values: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] values -> [B, L - output_start, ...]: the columns that may hold output text."""
        return values[:, self.layout.output_start :]


@dataclass
class Patches:
    """What is known in the vision tower.

    Parameters
    ----------
    hidden : [M, N, c]
        Patches that go to the projector.
    cls : [M, c]
        The class token's state of the same layer.
    query, key : [M, 1 + N, c]
        Of the policy's `vision_layer`, before they are split into heads; the class token first.
    heads : int
    """

    hidden: torch.Tensor
    cls: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    heads: int

    def cls_attention(self, heads: int | None = None) -> torch.Tensor:
        """float32 [M, N]: the class token's attention to the patches, mean over `heads` (default: the tower's)."""
        heads = heads or self.heads
        width = self.query.shape[-1] // heads
        query = self.query[:, 0].unflatten(-1, (heads, width)).float()
        key = self.key.unflatten(-1, (heads, width)).float()
        weights = torch.einsum("mhc,mnhc->mhn", query, key).mul(width**-0.5).softmax(-1)
        return weights[..., 1:].mean(1)


@dataclass
class Reduced:
    """Fewer image tokens: `tokens` [M, N, c] in the places that `keep` bool [M, N] marks, in the order of places."""

    tokens: torch.Tensor
    keep: torch.Tensor
    score: torch.Tensor | None = None  # [M, N]
