"""FastV: image tokens by the attention of the last prompt token."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.policies.base import Choice, Gate, ImagePolicy, share, top_tokens
from dynllava_plugin.sparsity.selection import num_kept_image_tokens


@dataclass(frozen=True, kw_only=True)
class FastV(ImagePolicy):
    """Layers 0..k-1 see everything; layers k.. the image tokens that the last prompt token attends to most.

    The attention is layer k-1's, averaged over heads; position ids stay. `r` is the paper's ratio, the share of each
    image's tokens that GOES; without it the share `keep` stays. A later prompt part behind the cache doesn't
    choose again.
    """

    name = "fastv"
    rule = "image tokens that the last prompt token attends to most, in layer k-1"
    source = "arXiv 2403.06764"
    static_prefill = True
    layer_argument = "k"
    follows = False

    k: int = 3
    r: float | None = None

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layer before."""
        return (self.k - 1,)

    def named_tokens(self, total: int) -> int:
        """floor((1 - r) * total), at least one."""
        return num_kept_image_tokens(total, self.keep if self.r is None else 1 - self.r)

    def keep_image(self, gate: Gate) -> Choice:
        """By `Gate.attention`."""
        assert gate.attention is not None
        score = gate.of_images(gate.attention)
        return top_tokens(score, self.kept_tokens(score.shape[1]))

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `ImagePolicy.check`, and r."""
        super().check(num_layers, text_predictor)
        if self.r is not None:
            share(self.name, "r", self.r, zero=True)
