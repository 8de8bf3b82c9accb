"""Dynamic-LLaVA: two learned predictors at the gate (arXiv 2412.00876, Eq. 5 and 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import IMAGE, OUTPUT, Choice, Gate, ImagePolicy, OutputPolicy, Part, share
from dynllava_plugin.sparsity.selection import keep_score, select_image_tokens, select_text_tokens

_PAPER = "arXiv 2412.00876"


@dataclass(frozen=True, kw_only=True)
class LearnedImage(ImagePolicy):
    """Dynamic-LLaVA_I: the image tokens that the image predictor scores highest.

    `threshold` is a budget that each image decides: the tokens whose predicted probability of being kept is above it stay,
    and the likeliest one where there is none. It isn't in the paper, whose predictor was trained towards one share.
    """

    name = "image"
    rule = "image tokens by the image predictor (Dynamic-LLaVA, I)"
    source = _PAPER
    reads_question = False
    static_prefill = True
    learned = True
    follows = False  # the predictors were trained at their layer

    layer: int = 2
    threshold: float | None = None

    @property
    def fixed(self) -> bool:
        """Return whether the number of tokens that stay is known without looking at the image."""
        return self.threshold is None

    def named_tokens(self, total: int) -> int:
        """Return the share `keep` of `total`, or, where the image decides, as many as there may be."""
        return super().named_tokens(total) if self.fixed else total

    def score(self, gate: Gate) -> torch.Tensor:
        """Return what Eq. 5 ranks."""
        return keep_score(gate.image_predictor(gate.of_images(gate.hidden)))

    def keep_image(self, gate: Gate) -> Choice:
        """Eq. 5, or the tokens above the threshold."""
        if self.threshold is None:
            return super().keep_image(gate)
        score = self.score(gate)
        return Choice((score.float().sigmoid() > self.threshold) | select_image_tokens(score, 1), score)

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `ImagePolicy.check`, and the threshold."""
        super().check(num_layers, text_predictor)
        if self.threshold is not None:
            share(
                self.name, "threshold", self.threshold, "no probability is above 1, and something must stay"
            )


@dataclass(frozen=True, kw_only=True)
class LearnedText(OutputPolicy):
    """The output tokens that the text predictor keeps; to be combined with an image policy."""

    name = "text"
    rule = "output tokens by the text predictor"
    source = _PAPER
    static_prefill = True
    learned = True
    follows = False

    def keep_output(self, gate: Gate) -> Choice:
        """Eq. 6."""
        score = keep_score(gate.text_predictor(gate.of_output(gate.hidden)))
        return Choice(select_text_tokens(score), score)


class LearnedImageText(Part):
    """Dynamic-LLaVA_I|T: both predictors."""

    name = "image_text"
    rule = "image and output tokens by the predictors (Dynamic-LLaVA, I|T)"
    source = _PAPER
    reads_question = False
    decides = frozenset({IMAGE, OUTPUT})
    parts = (LearnedImage, LearnedText)


class Full(Part):
    """Full context: everything stays."""

    name = "full"
    rule = "everything stays"
    source = "LLaVA-1.5"
    reads_question = False
    layer_argument = None
