"""Chance: the controls that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Choice, Gate, ImagePolicy, OutputPolicy, argument, integer, share
from dynllava_plugin.sparsity.selection import random_image_scores

_PAPER = "arXiv 2412.00876, baselines"


@dataclass(frozen=True, kw_only=True)
class RandomImage(ImagePolicy):
    """The share `r` (or `keep`) of each image's tokens, drawn from a seed of the image and `seed`."""

    name = "random"
    rule = "image tokens by chance"
    source = _PAPER
    reads_question = False
    uses_chance = True

    layer: int = 2
    r: float | None = argument(None, share)
    seed: int = argument(0, integer)

    def score(self, gate: Gate) -> torch.Tensor:
        """Return what the image's seed draws: an image is treated alike alone and in any batch."""
        return random_image_scores(gate.image_seeds, gate.tokens_per_image, gate.hidden.device)


@dataclass(frozen=True, kw_only=True)
class RandomText(OutputPolicy):
    """The share `r` of output tokens, each by a fair draw from its position and `seed`."""

    name = "random_text"
    rule = "output tokens by chance"
    source = _PAPER

    r: float = argument(0.5, share)
    seed: int = argument(0, integer)

    @property
    def output_share(self) -> float:
        """Return `r`."""
        return self.r

    def keep_output(self, gate: Gate) -> Choice:
        """Decide by the position alone, so that every way to decode draws alike."""
        score = uniform(gate.of_output(gate.position_ids.expand_as(gate.valid)), self.seed)
        return Choice(score < self.r, self.r - score)


def uniform(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """int64 tensor -> float32 in [0, 1) of the same shape: a hash of number and seed (splitmix's finaliser, 32 bits)."""
    mask = 0xFFFFFFFF
    offset = ((seed & mask) * 0x85EBCA6B) & mask
    x = ((numbers & mask) * 0x1E3779B1 + offset) & mask
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor & mask
    return ((x ^ (x >> 15)) >> 8).float() / 2**24
