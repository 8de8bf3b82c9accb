"""Dynamic-LLaVA: two learned predictors at the gate (arXiv 2412.00876, Eq. 5 and 6)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import (
    IMAGE,
    OUTPUT,
    Choice,
    Gate,
    ImagePolicy,
    OutputPolicy,
    Part,
    share,
    top_tokens,
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
    threshold: float | None = None
    later: tuple[tuple[int, float], ...] = field(default=(), metadata={"argument": False})

    @property
    def layers(self) -> tuple[int, ...]:
        """Return every gate's layer."""
        return (self.layer, *(layer for layer, _ in self.later))

    @property
    def fixed(self) -> bool:
        """Return whether the number of tokens that stay is known without looking at the image."""
        return self.threshold is None

    def named_tokens(self, total: int) -> int:
        """Return the share `keep` of `total`, or, where the image decides, as many as there may be."""
        return super().named_tokens(total) if self.fixed else total

    def left(self, total: int) -> tuple[int, ...]:
        """Return how many of an image's `total` tokens stay behind each gate, or may where the image decides."""
        counts = [super().kept_tokens(total)]
        for _, rate in self.later:
            counts.append(num_kept_image_tokens(counts[-1], rate) if self.fixed else total)
        return tuple(counts)

    def kept_tokens(self, total: int) -> int:
        """Return how many of an image's `total` tokens stay in the end."""
        return self.left(total)[-1]

    def budget(self, gate: Gate) -> int:
        """Return how many tokens of each image in question stay behind this gate."""
        here, rates = gate.tokens_per_image, dict(self.later)
        return num_kept_image_tokens(here, rates[gate.layer]) if gate.layer in rates else self.left(here)[0]

    def image_stages(self, total: float, kept: float, num_layers: int) -> tuple[tuple[int, float], ...]:
        """Return every gate's layer with what it leaves; where `total` is a mean over images, in the gates' shares."""
        counts, whole = [kept], int(total)
        for _, rate in self.later[::-1]:
            counts.insert(0, counts[0] / rate)
        if self.fixed and whole == total and self.left(whole)[-1] == kept:
            counts = list(self.left(whole))
        return tuple(zip(self.layers, (min(count, total) for count in counts), strict=True))

    def score(self, gate: Gate) -> torch.Tensor:
        """Return what Eq. 5 ranks; a predictor for many budgets is told this one."""
        hidden = gate.of_images(gate.hidden)
        share = self.budget(gate) / max(gate.whole_image, 1) if self.fixed else self.keep
        return keep_score(
            gate.image_predictor(hidden, torch.full(hidden.shape[:1], share, device=hidden.device))
        )

    def keep_image(self, gate: Gate) -> Choice:
        """Eq. 5, or the tokens above the threshold."""
        score = self.score(gate)
        if self.threshold is None:
            return top_tokens(score, self.budget(gate))
        return Choice((score.float().sigmoid() > self.threshold) | select_image_tokens(score, 1), score)

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `ImagePolicy.check`, and the threshold."""
        super().check(num_layers, text_predictor)
        if self.later and self.tokens is not None:
            raise UserError(
                f"{self.name}: tokens={self.tokens}, but it has gates at {self.layers}; give keep"
            )
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
