"""Dynamic-LLaVA: two learned predictors at the gate (arXiv 2412.00876, Eq. 5 and 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from dynllava_plugin.policies.base import (
    IMAGE,
    OUTPUT,
    PROMPT,
    Choice,
    Gate,
    ImagePolicy,
    OutputPolicy,
    Part,
    argument,
    number,
)
from dynllava_plugin.sparsity.selection import (
    keep_score,
    num_kept_image_tokens,
    select_image_tokens,
    select_text_tokens,
)

_PAPER = "arXiv 2412.00876"


@dataclass(frozen=True, kw_only=True)
class LearnedImage(ImagePolicy):
    """Dynamic-LLaVA_I: the image tokens that the image predictor scores highest.

    A checkpoint that was trained with several gates has `later` ones, (layer, share of what reaches it that stays), each with a
    predictor of its own; a `layer` by argument names one gate.

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
    threshold: float | None = argument(
        None,
        number(
            "outside [0, 1): no probability is above 1, and something must stay", lambda value: 0 <= value < 1
        ),
    )
    later: tuple[tuple[int, float], ...] = field(default=(), metadata={"argument": False})

    @property
    def layers(self) -> tuple[int, ...]:
        """Return every gate's layer."""
        return (self.layer, *(layer for layer, _ in self.later))

    @property
    def fixed(self) -> bool:
        """Return whether the number of tokens that stay is known without looking at the image."""
        return self.threshold is None

    @property
    def kept_share(self) -> float:
        """Return the share behind the last gate; `keep` is the first one's."""
        return self.keep * math.prod(rate for _, rate in self.later)

    def shares_left(self, kept: float) -> tuple[float, ...]:
        """Return the share behind each gate, in the checkpoint's proportions."""
        shares = [kept]
        for _, rate in self.later[::-1]:
            shares.insert(0, min(1.0, shares[0] / rate))
        return tuple(shares)

    def counts(self, total: int, kept: float) -> tuple[int, ...]:
        """Return what is left behind each gate: a later one rounds its share of what reaches it."""
        counts = [num_kept_image_tokens(total, self.shares_left(kept)[0])]
        for _, rate in self.later:
            counts.append(num_kept_image_tokens(counts[-1], rate))
        return tuple(counts)

    def score(self, gate: Gate) -> torch.Tensor:
        """Return what Eq. 5 ranks; a predictor for many budgets is told this one."""
        hidden = gate.of_images(gate.hidden)
        share = self.budget(gate) / max(gate.whole_image, 1) if self.fixed else self.keep
        return keep_score(
            gate.image_predictor(hidden, torch.full(hidden.shape[:1], share, device=hidden.device))
        )

    def keep_image(self, gate: Gate) -> Choice:
        """Eq. 5, or the tokens above the threshold."""
        if self.threshold is None:
            return super().keep_image(gate)
        score = self.score(gate)
        return Choice((score.float().sigmoid() > self.threshold) | select_image_tokens(score, 1), score)


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


@dataclass(frozen=True, kw_only=True)
class LearnedPrompt(Part):
    """The tokens of the prompt's last question that the prompt predictor keeps, and that question's last token.

    Not part of the method (Table 9 drops 0.3 of the prompt's text by it); settings turn it on, not a policy's name.
    """

    name = "prompt"
    rule = "tokens of the last question by the prompt predictor"
    source = _PAPER
    decides = frozenset({PROMPT})
    learned = True
    static_prefill = False  # how many stay is known behind the gate

    layer: int = 2

    def keep_prompt(self, gate: Gate) -> torch.Tensor:
        """Return bool [B, L], False on the tokens that go: the decision of Eq. 6, before the first output token."""
        question = gate.layout.question
        assert question is not None
        columns = torch.arange(question.shape[1], device=question.device)
        last = columns == torch.where(question, columns, -1).amax(1, keepdim=True)
        return select_text_tokens(keep_score(gate.prompt_predictor(gate.hidden))) | ~question | last


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
