"""What a method decides: image tokens, output tokens or what leaves the cache; a file each builds on one of these.

Most methods are a score: an `ImagePolicy` overrides `score`, a `PatchPolicy` `score_patches`, and the base keeps the highest
of each image within the budget. A method that is more than a ranking overrides `keep_image`, `reduce_tokens` or `choose`.
`policy.Policy` is what the model asks: at most one of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.points import Choice, Gate, Patches
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.config import argument, count, number, share
from dynllava_plugin.sparsity.selection import num_kept_image_tokens, select_image_tokens

IMAGE, OUTPUT, PROMPT, CACHE = "image", "output", "prompt", "cache"
# What a method may need of a family, as an error names it.
CLASS_TOKEN, SQUARE = "the class token of a CLIP vision tower", "images of one square grid of tokens"
P = TypeVar("P", bound="Part")

integer = number("not an integer", lambda value: True, int)
fraction = number("outside [0, 1]", lambda value: 0 <= value <= 1)
gone = number(
    "outside [0, 1): it is the share that goes, and something must stay", lambda value: 0 <= value < 1
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A method: a frozen dataclass whose fields are its arguments.

    `keep`, `layer`, `start_layer` and `seed`, where a subclass has them, default to the model's settings.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    source: ClassVar[str]
    decides: ClassVar[frozenset[str]] = frozenset()
    # What a registered name is short for, where it is more than one method.
    parts: ClassVar[tuple[type[Part], ...]] = ()
    # It asks the checkpoint's predictor of what it decides.
    learned: ClassVar[bool] = False
    # Whether what it decides may depend on the prompt's words, before or behind an image, or on the prompt coming in one
    # call; False lets prompts that begin alike share their prefill.
    reads_question: ClassVar[bool] = True
    # Whether its gates are tensor operations whose shapes follow from the prompt's length and images alone, without a wait
    # for a value: such a prefill can be captured.
    static_prefill: ClassVar[bool] = False
    # The argument that says at which layer it acts, None where its gates are elsewhere than the other parts'; in a
    # combination it follows the other part's, unless `follows` is False.
    layer_argument: ClassVar[str | None] = "layer"
    follows: ClassVar[bool] = True
    # `keep` doesn't default to the model's rate.
    own_budget: ClassVar[bool] = False
    # What it needs of a family beside tokens: `CLASS_TOKEN`, `SQUARE`.
    needs: ClassVar[str | None] = None

    # The LLM's, told by `of_depth`; None as long as no model is in sight. No argument of a user's.
    num_layers: int | None = field(default=None, repr=False, metadata={"argument": False})

    def of_depth(self: P, num_layers: int) -> P:
        """Return the same method in a model of `num_layers` layers."""
        return replace(self, num_layers=num_layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers at whose input it acts, in order; 0 is before the LLM."""
        return (getattr(self, self.layer_argument),) if self.layer_argument else ()

    def check(self) -> None:
        """Raise `UserError` for an argument out of range or a method that doesn't fit the model."""
        for one in fields(self):
            check, value = one.metadata.get("check"), getattr(self, one.name)
            if check and value is not None:
                check(f"{self.name}: {one.name}=", value)
        for layer in self.layers if self.layer_argument else ():
            count(f"{self.name}: {self.layer_argument}=", layer)
            self.inside(layer)

    def inside(self, layer: int) -> None:
        """Raise `UserError` for a layer that the model hasn't got."""
        if self.num_layers is not None and layer >= self.num_layers:
            raise UserError(
                f"{self.name}: layer {layer} is outside the model, which has layers 0..{self.num_layers - 1}"
            )


@dataclass(frozen=True, kw_only=True)
class OutputPolicy(Part):
    """A method that decides which output tokens stay as context."""

    decides: ClassVar[frozenset[str]] = frozenset({OUTPUT})
    reads_question: ClassVar[bool] = False

    layer: int = 2

    @property
    def output_share(self) -> float | None:
        """Return the share of the output tokens that stay; None where the text predictor decides it."""
        return None

    def keep_output(self, gate: Gate) -> Choice:
        """Return which output tokens stay, bool [B, L - output_start]."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CachePolicy(Part):
    """A method that lets tokens leave the KV cache of the layers from `start_layer` on.

    A step depends on what earlier steps did: there is no run without a cache and no scoring in one pass.
    """

    decides: ClassVar[frozenset[str]] = frozenset({CACHE})
    layer_argument: ClassVar[str] = "start_layer"

    r: float = argument(0.5, share)
    start_layer: int = 2

    @property
    def output_share(self) -> float:
        """Return the share of the output tokens that the cache holds."""
        return self.r

    @property
    def splits(self) -> tuple[int, ...]:
        """Layers from which on the cache holds other tokens than before."""
        return self.layers

    @property
    def cache_rule(self) -> CachePolicy:
        """Return what a cache must have been made for (`SparseContextCache.rule`): the method, of whatever model."""
        return replace(self, num_layers=None)

    def new_cache(self, num_layers: int) -> SparseContextCache:
        """Return an empty KV cache."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ImagePolicy(Part):
    """A method with a budget of image tokens: the share `keep` of each image's, at least one.

    `tokens` is the budget as papers count it, the mean over the LLM's layers of an image's tokens, whatever the layers at
    which the method acts; the largest that doesn't exceed it is kept. An image of no more tokens is kept whole. A subclass
    may have `n`, a number of tokens, or `r`, a share, as its paper's budget.
    """

    decides: ClassVar[frozenset[str]] = frozenset({IMAGE})
    uses_chance: ClassVar[bool] = False
    # It looks at the attention in the layer before each of its gates: `Gate.attention`.
    looks_at_attention: ClassVar[bool] = False
    # Its gate is at layer 0; `reduces_patches`: what passes it was chosen in the vision tower.
    at_input: ClassVar[bool] = False
    reduces_patches: ClassVar[bool] = False

    keep: float = argument(0.2, share)
    tokens: float | None = argument(None, number("not a number of at least 1", lambda value: value >= 1))

    @property
    def fixed(self) -> bool:
        """Return whether the number of tokens that stay is known without looking at the image."""
        return True

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention is `Gate.attention` at the gate behind them; empty where no gate needs it."""
        return tuple(layer - 1 for layer in self.layers) if self.looks_at_attention else ()

    @property
    def first(self) -> Any:
        """Return who decides at the first gate: itself, unless it is made of several."""
        return self

    @property
    def packed_positions(self) -> bool:
        """Return whether tokens behind a removed one move up, as where fewer image tokens are put into a prompt."""
        return self.at_input and getattr(self, "positions", "original") == "packed"

    def watched(self, gate: Gate) -> torch.Tensor | None:
        """Return bool [B, L], the tokens whose attention is looked at; None means the last prompt token's.

        Asked once, before the LLM.
        """
        return None

    def score(self, gate: Gate) -> torch.Tensor:
        """Return how much each token of the images in question speaks for staying, [M, N] on any scale: its attention."""
        assert gate.attention is not None
        return gate.of_images(gate.attention)

    def keep_image(self, gate: Gate) -> Choice:
        """Return which tokens of the images in question stay.

        Images of one number of tokens are asked about together, others in another call.
        """
        return top_tokens(self.score(gate), self.budget(gate))

    def budget(self, gate: Gate) -> int:
        """Return how many tokens of each image in question stay behind this gate."""
        left = self.left(gate.whole_image)[self.layers.index(gate.layer)]
        return min(left, gate.tokens_per_image)

    @property
    def kept_share(self) -> float:
        """Return the share of an image's tokens that stays in the end, by `keep` or `r`."""
        r = getattr(self, "r", None)
        return self.keep if r is None else r

    def shares_left(self, kept: float) -> tuple[float, ...]:
        """Return the share of an image's tokens behind each gate where the share `kept` is left in the end."""
        return (kept,)

    def left(self, total: int) -> tuple[int, ...]:
        """Return how many of an image's `total` tokens stay behind each gate."""
        n = getattr(self, "n", None)
        if self.tokens is not None:
            return self._solved(total, self.tokens)
        return self.counts(total, self.kept_share) if n is None else (min(n, total),)

    def kept_tokens(self, total: int) -> int:
        """Return how many of an image's `total` tokens stay in the end, or, where the image decides, as many as may."""
        return self.left(total)[-1] if self.fixed else total

    def counts(self, total: int, kept: float) -> tuple[int, ...]:
        """Return how many of `total` stay behind each gate where the share `kept` is left in the end."""
        return tuple(num_kept_image_tokens(total, part) for part in self.shares_left(kept))

    def _solved(self, total: int, tokens: float) -> tuple[int, ...]:
        """Return the most behind each gate with which the mean over layers is no more than `tokens`."""
        layers = self.num_layers
        if layers is None and not self.at_input:
            raise UserError(f"{self.name}: tokens={tokens} depends on the model's number of layers")

        def mean(kept: float) -> float:
            return mean_tokens(zip(self.layers, self.counts(total, kept), strict=True), total, layers or 1)

        low, high = 0.0, 1.0
        if mean(low) > tokens:
            raise UserError(
                f"{self.name}: no setting of it leaves tokens={tokens} of an image's {total}; the nearest is {mean(low):g}"
            )
        while mean(high) > tokens and high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) <= tokens else (low, middle)
        return self.counts(total, high if mean(high) <= tokens else low)

    def image_stages(self, total: float, kept: float) -> tuple[tuple[int, float], ...]:
        """Return (layer, image tokens from it on) of every gate, in order: of `total`, `kept` are left behind the last.

        Both may be sums or means over images, of which each gate's share is about the same; of one image they are exact.
        """
        if self.fixed and len(self.layers) > 1 and total == int(total) and self.left(int(total))[-1] == kept:
            return tuple(zip(self.layers, self.left(int(total)), strict=True))
        before = [total * part for part in self.shares_left(kept / total if total else 1.0)[:-1]]
        return tuple(zip(self.layers, [*before, kept], strict=True))

    def check_image(self, total: int) -> None:
        """Raise `UserError` for a budget of more than an image's `total` tokens, or one that no setting reaches."""
        for name in ("tokens", "n"):
            wanted = getattr(self, name, None)
            if wanted is not None and wanted > total:
                raise UserError(f"{self.name}: {name}={wanted}, but an image has {total} tokens")
        self.kept_tokens(total)


def _positions(called: str, value: Any) -> None:
    if value not in ("packed", "original"):
        raise UserError(f"{called}{value!r} is unknown; choose packed or original")


@dataclass(frozen=True, kw_only=True)
class InputPolicy(ImagePolicy):
    """An image policy that acts before the LLM.

    `positions` is "packed", as in the methods' LLaVA code, where the LLM is given a shorter prompt, or "original":
    every token keeps the position id it has with the whole image. Where positions turn on three axes (Qwen) an image's length
    is no number of tokens, and both are "original".
    """

    at_input: ClassVar[bool] = True
    layer_argument: ClassVar[str | None] = None
    positions: str = argument("packed", _positions)

    @property
    def layers(self) -> tuple[int, ...]:
        """Before the LLM."""
        return (0,)

    def keep_image(self, gate: Gate) -> Choice:
        """Return what the vision side chose, else what `reduce_tokens` chooses of the projected tokens."""
        if gate.layout.image_marks is not None:
            keep, score = gate.in_question(gate.layout.image_marks).unbind(-1)
            return Choice(keep > 0.5, score)
        return self.reduce_tokens(gate.of_images(gate.hidden), gate.question)

    def reduce_tokens(self, features: torch.Tensor, question: Callable[[], torch.Tensor]) -> Choice:
        """Return which projected image tokens [M, N, d] go on; `question()` is [M, d], the mean of the prompt's word embeddings."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PatchPolicy(InputPolicy):
    """An input policy that chooses `n` patches in a CLIP vision tower, before the projector."""

    reads_question: ClassVar[bool] = False
    reduces_patches: ClassVar[bool] = True
    needs: ClassVar[str | None] = CLASS_TOKEN
    # Whose queries and keys `Patches` has: of the layer that the projector reads ("selected") or of the "last" one.
    vision_layer: ClassVar[str] = "selected"

    n: int | None = argument(None, count)

    def earlier_layer(self, depth: int) -> int | None:
        """Return a second layer, of the tower's `depth`, whose queries and keys `Patches.earlier` is; None for no such."""
        return None

    def score_patches(self, patches: Patches) -> torch.Tensor:
        """Return how much each patch speaks for staying, [M, N]: the class token's attention."""
        return patches.cls_attention()

    def choose(self, patches: Patches, score: torch.Tensor, kept: int) -> torch.Tensor:
        """Return bool [M, N], the `kept` patches that stay: those of the highest score."""
        return select_image_tokens(score, kept)

    def reduce_patches(self, patches: Patches) -> Choice:
        """Return which patches go on to the projector, and as what (merged ones change)."""
        score, kept = self.score_patches(patches), self.kept_tokens(patches.hidden.shape[1])
        return Choice(self.choose(patches, score, kept), score, patches.hidden, kept)


def top_tokens(score: torch.Tensor, count: int) -> Choice:
    """Return the `count` highest of each image, of scores [M, N]."""
    return Choice(select_image_tokens(score, count), score, count=count)


def mean_tokens(stages: Iterable[tuple[int, float]], total: float, num_layers: int) -> float:
    """Return equivalent tokens: the mean over layers of the tokens present, `total` before the first of (layer, left)."""
    summed, start, present = 0.0, 0, total
    for layer, left in stages:
        summed += (layer - start) * present
        start, present = layer, left
    return (summed + (num_layers - start) * present) / num_layers
