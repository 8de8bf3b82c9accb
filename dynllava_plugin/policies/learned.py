"""Dynamic-LLaVA: two learned predictors at the gate (arXiv 2412.00876, Eq. 5 and 6)."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.policies.base import IMAGE, OUTPUT, Choice, Gate, ImagePolicy, Policy, top_tokens
from dynllava_plugin.sparsity.selection import keep_score, select_text_tokens

_PAPER = "arXiv 2412.00876"


@dataclass(frozen=True, kw_only=True)
class LearnedImage(ImagePolicy):
    """Dynamic-LLaVA_I: the image tokens that the image predictor scores highest."""

    name = "image"
    rule = "image tokens by the image predictor (Dynamic-LLaVA, I)"
    source = _PAPER
    reads_question = False
    static_prefill = True
    predictors = frozenset({IMAGE})
    follows = False  # the predictors were trained at their layer

    layer: int = 2

    def keep_image(self, gate: Gate) -> Choice:
        """Eq. 5."""
        score = keep_score(gate.image_predictor(gate.of_images(gate.hidden)))
        return top_tokens(score, self.kept_tokens(score.shape[1]))


@dataclass(frozen=True, kw_only=True)
class LearnedText(Policy):
    """The output tokens that the text predictor keeps; to be combined with an image policy."""

    name = "text"
    rule = "output tokens by the text predictor"
    source = _PAPER
    reads_question = False
    static_prefill = True
    decides = frozenset({OUTPUT})
    predictors = frozenset({OUTPUT})
    follows = False

    layer: int = 2

    def keep_output(self, gate: Gate) -> Choice:
        """Eq. 6."""
        score = keep_score(gate.text_predictor(gate.of_output(gate.hidden)))
        return Choice(select_text_tokens(score), score)


@dataclass(frozen=True, kw_only=True)
class LearnedImageText(LearnedImage):
    """Dynamic-LLaVA_I|T: both predictors."""

    name = "image_text"
    rule = "image and output tokens by the predictors (Dynamic-LLaVA, I|T)"
    decides = frozenset({IMAGE, OUTPUT})
    predictors = frozenset({IMAGE, OUTPUT})

    def keep_output(self, gate: Gate) -> Choice:
        """Eq. 6."""
        return LearnedText.keep_output(self, gate)  # type: ignore[arg-type]
