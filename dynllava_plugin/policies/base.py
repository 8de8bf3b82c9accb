"""What a method decides: image tokens, output tokens or what leaves the cache; a file each builds on one of these.

Most methods are a score: an `ImagePolicy` overrides `score`, a `PatchPolicy` `score_patches`, and the base keeps the highest
of each image within the budget. A method that is more than a ranking overrides `keep_image`, `reduce_tokens` or `choose`.
`policy.Policy` is what the model asks: at most one of each kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.points import Choice, Gate, Patches, TokenLayout
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.selection import num_kept_image_tokens, select_image_tokens

__all__ = [
    "CACHE",
    "IMAGE",
    "OUTPUT",
    "CachePolicy",
    "Choice",
    "Gate",
    "ImagePolicy",
    "InputPolicy",
    "OutputPolicy",
    "Part",
    "PatchPolicy",
    "Patches",
    "TokenLayout",
    "count",
    "share",
    "top_tokens",
]
IMAGE, OUTPUT, CACHE = "image", "output", "cache"
P = TypeVar("P", bound="Part")


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

    # The LLM's, told by `of_depth`; None as long as no model is in sight. No argument of a user's.
    num_layers: int | None = field(default=None, repr=False, metadata={"argument": False})

    def of_depth(self: P, num_layers: int) -> P:
        """Return the same method in a model of `num_layers` layers."""
        return replace(self, num_layers=num_layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers at whose input it acts, in order; 0 is before the LLM."""
        return (getattr(self, self.layer_argument),) if self.layer_argument else ()

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """Raise `UserError` for an argument out of range or a method that doesn't fit the model."""
        for layer in self.layers if self.layer_argument else ():
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
                raise UserError(f"{self.name}: layer {layer!r} is not a positive integer")
            self.inside(layer, num_layers)

    def inside(self, layer: int, num_layers: int | None) -> None:
        """Raise `UserError` for a layer that a model of `num_layers` layers hasn't got."""
        if num_layers is not None and layer >= num_layers:
            raise UserError(
                f"{self.name}: layer {layer} is outside the model, which has layers 0..{num_layers - 1}"
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

    r: float = 0.5
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
    def cache_rule(self) -> tuple[Any, ...]:
        """Return what a cache must have been made for (`SparseContextCache.rule`)."""
        return (self.name, self.r)

    def new_cache(self, num_layers: int) -> SparseContextCache:
        """Return an empty KV cache."""
        raise NotImplementedError

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `Part.check`, and r."""
        super().check(num_layers, text_predictor)
        share(self.name, "r", self.r)


@dataclass(frozen=True, kw_only=True)
class ImagePolicy(Part):
    """A method with a budget of image tokens: the share `keep` of each image's, at least one.

    `tokens` is the budget as papers count it, the mean over the LLM's layers of an image's tokens, whatever the layer at
    which the method acts; the largest that doesn't exceed it is kept. An image of no more tokens is kept whole. A subclass
    may have `n`, a number of tokens, or `r`, a share that stays (that goes with `r_goes`), as its paper's budget.
    """

    decides: ClassVar[frozenset[str]] = frozenset({IMAGE})
    uses_chance: ClassVar[bool] = False
    r_goes: ClassVar[bool] = False
    # Its gate is at layer 0; `reduces_patches`: what passes it was chosen in the vision tower.
    at_input: ClassVar[bool] = False
    reduces_patches: ClassVar[bool] = False

    keep: float = 0.2
    tokens: float | None = None

    @property
    def fixed(self) -> bool:
        """Return whether the number of tokens that stay is known without looking at the image."""
        return True

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention is `Gate.attention` at the gate behind them; empty where no gate needs it."""
        return ()

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
        """Return how much each token of the images in question speaks for staying, [M, N] on any scale."""
        raise NotImplementedError

    def keep_image(self, gate: Gate) -> Choice:
        """Return which tokens of the images in question stay.

        Images of one number of tokens are asked about together, others in another call.
        """
        score = self.score(gate)
        return top_tokens(score, self.kept_tokens(score.shape[1]))

    def named_tokens(self, total: int) -> int:
        """Return how many of an image's `total` tokens stay by `keep`, `n` or `r`."""
        n, r = getattr(self, "n", None), getattr(self, "r", None)
        if n is not None:
            return min(n, total)
        return num_kept_image_tokens(total, self.keep if r is None else 1 - r if self.r_goes else r)

    def kept_tokens(self, total: int) -> int:
        """Return how many of an image's `total` tokens stay in the end."""
        return self.named_tokens(total) if self.tokens is None else self.solved_tokens(total)

    def solved_tokens(self, total: int) -> int:
        """Return the most behind the gate with which the mean over layers is no more than `tokens`."""
        assert self.tokens is not None
        before, layers = (0, 1) if self.at_input else (self.layers[0], self.depth)
        found = math.floor((self.tokens * layers - before * total) / (layers - before) + 1e-9)
        self.reached(found >= 1, (before * total + layers - before) / layers, total)
        return min(found, total)

    @property
    def depth(self) -> int:
        """Return the model's number of layers, which a budget of `tokens` depends on."""
        if self.num_layers is None:
            raise UserError(f"{self.name}: tokens={self.tokens} depends on the model's number of layers")
        return self.num_layers

    def reached(self, reached: bool, nearest: float, total: int) -> None:
        """Raise `UserError` unless the budget is `reached`; `nearest` is the smallest for an image of `total` tokens."""
        if not reached:
            raise UserError(
                f"{self.name}: no setting of it leaves tokens={self.tokens} of an image's {total}; the nearest is {nearest:g}"
            )

    def image_stages(self, total: float, kept: float, num_layers: int) -> tuple[tuple[int, float], ...]:
        """Return (layer, image tokens from it on) of every gate, in order: of `total`, `kept` are left behind the last."""
        return ((self.layers[0], kept),)

    def check_image(self, total: int) -> None:
        """Raise `UserError` for a budget of more than an image's `total` tokens, or one that no setting reaches."""
        for argument in ("tokens", "n"):
            wanted = getattr(self, argument, None)
            if wanted is not None and wanted > total:
                raise UserError(f"{self.name}: {argument}={wanted}, but an image has {total} tokens")
        self.kept_tokens(total)

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `Part.check`, and the budget."""
        super().check(num_layers, text_predictor)
        share(self.name, "keep", self.keep)
        if getattr(self, "r", None) is not None:
            goes = "it is the share that goes, and something must stay" if self.r_goes else ""
            share(self.name, "r", self.r, goes)  # type: ignore[attr-defined]
        if getattr(self, "n", None) is not None:
            count(self.name, "n", self.n)  # type: ignore[attr-defined]
        tokens = self.tokens
        if tokens is not None and (
            isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not tokens >= 1
        ):
            raise UserError(f"{self.name}: tokens={tokens!r} is not a number of at least 1")


@dataclass(frozen=True, kw_only=True)
class InputPolicy(ImagePolicy):
    """An image policy that acts before the LLM.

    `positions` is "packed", as in the methods' LLaVA code, where the LLM is given a shorter prompt, or "original":
    every token keeps the position id it has with the whole image.
    """

    at_input: ClassVar[bool] = True
    layer_argument: ClassVar[str | None] = None
    positions: str = "packed"

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

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `ImagePolicy.check`, and `positions`."""
        super().check(num_layers, text_predictor)
        if self.positions not in ("packed", "original"):
            raise UserError(
                f"{self.name}: positions={self.positions!r} is unknown; choose packed or original"
            )


@dataclass(frozen=True, kw_only=True)
class PatchPolicy(InputPolicy):
    """An input policy that chooses `n` patches in a CLIP vision tower, before the projector."""

    reads_question: ClassVar[bool] = False
    reduces_patches: ClassVar[bool] = True
    # Whose queries and keys `Patches` has: of the layer that the projector reads ("selected") or of the "last" one.
    vision_layer: ClassVar[str] = "selected"

    n: int | None = None

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


def share(name: str, argument: str, value: Any, below: str = "") -> None:
    """Raise `UserError` unless `value` is in (0, 1], or in [0, 1) where `below` says why it can't be 1."""
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not (0 <= value < 1 if below else 0 < value <= 1):
        raise UserError(
            f"{name}: {argument}={value!r} is outside {f'[0, 1): {below}' if below else '(0, 1]'}"
        )


def count(name: str, argument: str, value: Any) -> None:
    """Raise `UserError` unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: {argument}={value!r} is not a positive integer")
