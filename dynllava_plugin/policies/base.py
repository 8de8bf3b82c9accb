"""What a policy is: which tokens stay, where, and what it may look at to decide.

The model asks a policy at named points and knows none by name:

1. `keep_image` and `keep_output` at its gates, the inputs of the layers in `layers`: what later layers hold. A gate at
   layer 0 stands before the LLM, where `reduce_tokens` is told the projected image tokens;
2. `reduce_patches` inside the vision tower, for policies that look at patches before the projector;
3. `new_cache`: a KV cache that may let tokens go later.

A policy overrides the points where it decides something and says so in `decides`.
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
    "Choice",
    "Gate",
    "ImagePolicy",
    "InputPolicy",
    "Patches",
    "Policy",
    "TokenLayout",
    "count",
    "share",
    "top_tokens",
]
IMAGE, OUTPUT, CACHE = "image", "output", "cache"
P = TypeVar("P", bound="Policy")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Everything stays, unless a subclass overrides a point and names what it decides.

    A subclass is a frozen dataclass whose fields are its arguments. `keep`, `layer` and `seed`, where a subclass has
    them, default to the model's `vision_keep_rate`, `sparse_layer` and `random_seed`.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    source: ClassVar[str]
    # IMAGE, OUTPUT and CACHE: whose tokens it drops, and which of the checkpoint's predictors it reads.
    decides: ClassVar[frozenset[str]] = frozenset()
    predictors: ClassVar[frozenset[str]] = frozenset()
    uses_chance: ClassVar[bool] = False
    # A step depends on what earlier steps did: no run without a cache, no scoring in one pass.
    sequential: ClassVar[bool] = False
    # Whether what it decides may depend on the prompt's words, before or behind an image, or on the prompt coming in one
    # call; False lets prompts that begin alike share their prefill.
    reads_question: ClassVar[bool] = True
    # Whether its gates are tensor operations whose shapes follow from the prompt's length and images alone, without a wait
    # for a value: such a prefill can be captured.
    static_prefill: ClassVar[bool] = False
    # Its gate is at layer 0; `reduces_patches`: what passes it was chosen in the vision tower.
    at_input: ClassVar[bool] = False
    reduces_patches: ClassVar[bool] = False
    # Whose queries and keys `Patches` has: of the layer that the projector reads ("selected") or of the "last" one.
    vision_layer: ClassVar[str] = "selected"
    # The argument that says at which layer it acts; in a combination it follows the other part's, unless `follows` is False.
    layer_argument: ClassVar[str] = "layer"
    follows: ClassVar[bool] = True
    # `keep` doesn't default to the model's rate.
    own_budget: ClassVar[bool] = False
    # Its gates follow from the model's depth: no other policy can share its layer.
    several_gates: ClassVar[bool] = False

    # The LLM's, told by `of_depth`; None as long as no model is in sight. No argument of a user's.
    num_layers: int | None = field(default=None, repr=False, metadata={"argument": False})

    def of_depth(self: P, num_layers: int) -> P:
        """Return the same policy in a model of `num_layers` layers."""
        return replace(self, num_layers=num_layers)

    @property
    def gate_layer(self) -> int:
        """The first layer with a reduced context; of no consequence to a policy that acts before the LLM only."""
        return getattr(self, self.layer_argument, 1)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers at whose input it has a gate, in order; 0 is before the LLM."""
        if self.at_input:
            return (0,)
        return (self.gate_layer,) if self.decides & {IMAGE, OUTPUT} else ()

    @property
    def splits(self) -> tuple[int, ...]:
        """Layers from which on a cache holds other tokens than before; each begins a track."""
        return tuple(layer for layer in self.layers if layer > 0)

    @property
    def packed_positions(self) -> bool:
        """Whether tokens behind a removed one move up, as where fewer image tokens are put into a prompt."""
        return self.at_input and getattr(self, "positions", "original") == "packed"

    def kept_tokens(self, total: int) -> int:
        """How many of an image's `total` tokens stay."""
        return total

    @property
    def output_share(self) -> float | None:
        """Share of the output tokens that stay as context; None where the text predictor decides it."""
        return None if OUTPUT in self.predictors else 1.0

    @property
    def cache_share(self) -> float:
        """Share of the tokens fed to the layers from the gate on that their KV cache holds."""
        return 1.0

    @property
    def cache_output_share(self) -> float:
        """The same of the output tokens alone."""
        return self.cache_share

    @property
    def image_seed(self) -> int | None:
        """What an image's own seed is mixed with; None where nothing is left to chance."""
        return int(getattr(self, "seed", 0)) if self.uses_chance else None

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose last prompt row `Gate.attention` is at the gate behind them; empty where no gate needs it."""
        return ()

    @property
    def cache_rule(self) -> object:
        """What the KV cache must know of the policy (`SparseContextCache.rule`); None for one that lets nothing go."""
        return None

    def asks_output(self, layer: int) -> bool:
        """Return whether the gate at `layer` decides on output text, so that a decoding step has to ask it."""
        return OUTPUT in self.decides and layer in self.layers

    def reduce_patches(self, patches: Patches) -> Choice:
        """Return which patches go on to the projector, and as what (merged ones change)."""
        raise NotImplementedError

    def keep_image(self, gate: Gate) -> Choice | None:
        """Return which tokens of the images in question stay, bool [M, N]; None keeps all.

        Images of one number of tokens are asked about together, others in another call.
        """
        return None

    def keep_output(self, gate: Gate) -> Choice | None:
        """Return which output tokens stay as context, bool [B, L - output_start]; None keeps all."""
        return None

    def new_cache(self, num_layers: int) -> SparseContextCache:
        """An empty KV cache."""
        return SparseContextCache(num_layers, self.splits)

    def image_stages(self, total: float, kept: float, num_layers: int) -> tuple[tuple[int, float], ...]:
        """Return (layer, image tokens from it on) of every gate, in order: of `total`, `kept` are left behind the last."""
        if IMAGE not in self.decides:
            return ()
        return ((0 if self.at_input else self.gate_layer, kept),)

    def image_tokens(self, total: float, kept: float, num_layers: int) -> float:
        """Return equivalent tokens: the mean over the LLM's layers of the image tokens present, `kept` of `total` in the end."""
        summed, start, present = 0.0, 0, total
        for layer, left in self.image_stages(total, kept, num_layers):
            summed += (layer - start) * present
            start, present = layer, left
        return (summed + (num_layers - start) * present) / num_layers

    def check_image(self, total: int) -> None:
        """`UserError` for a budget that an image of `total` tokens can't have; for models whose images all have so many."""

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """`UserError` for an argument out of range or a policy that doesn't fit the model."""
        if self.at_input or not self.decides:
            return
        layer = self.gate_layer
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise UserError(f"{self.name}: layer {layer!r} is not a positive integer")
        if num_layers is not None and layer >= num_layers:
            raise UserError(
                f"{self.name}: layer {layer} is outside the model, which has layers 0..{num_layers - 1}"
            )
        if OUTPUT in self.predictors and not text_predictor:
            raise UserError(
                f"{self.name}: needs an output-text predictor, which this checkpoint lacks; use 'image'"
            )


@dataclass(frozen=True, kw_only=True)
class ImagePolicy(Policy):
    """A policy with a budget of image tokens: the share `keep` of each image's, at least one.

    `tokens` is the budget as papers count it, the mean over the LLM's layers of an image's tokens, whatever the layer at
    which the policy acts; the largest that doesn't exceed it is kept. An image of no more tokens is kept whole.
    """

    decides: ClassVar[frozenset[str]] = frozenset({IMAGE})

    keep: float = 0.2
    tokens: float | None = None

    def named_tokens(self, total: int) -> int:
        """How many of an image's `total` tokens stay, by the policy's own arguments."""
        return num_kept_image_tokens(total, self.keep)

    def kept_tokens(self, total: int) -> int:
        """How many of an image's `total` tokens stay."""
        return self.named_tokens(total) if self.tokens is None else self.solved_tokens(total)

    def solved_tokens(self, total: int) -> int:
        """The most behind the gate with which the mean over layers is no more than `tokens`."""
        assert self.tokens is not None
        before, layers = (0, 1) if self.at_input else (self.gate_layer, self._depth)
        found = math.floor((self.tokens * layers - before * total) / (layers - before) + 1e-9)
        self.reached(found >= 1, (before * total + layers - before) / layers, total)
        return min(found, total)

    @property
    def _depth(self) -> int:
        if self.num_layers is None:
            raise UserError(f"{self.name}: tokens={self.tokens} depends on the model's number of layers")
        return self.num_layers

    def reached(self, reached: bool, nearest: float, total: int) -> None:
        """`UserError` unless the budget is `reached`; `nearest` is the smallest there is for an image of `total` tokens."""
        if not reached:
            raise UserError(
                f"{self.name}: no setting of it leaves tokens={self.tokens} of an image's {total}; the nearest is {nearest:g}"
            )

    def check_image(self, total: int) -> None:
        """That `tokens` or `n` isn't more than there are, and that some setting reaches it."""
        for argument in ("tokens", "n"):
            wanted = getattr(self, argument, None)
            if wanted is not None and wanted > total:
                raise UserError(f"{self.name}: {argument}={wanted}, but an image has {total} tokens")
        self.kept_tokens(total)

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `Policy.check`, and the budget."""
        super().check(num_layers, text_predictor)
        share(self.name, "keep", self.keep)
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
    positions: str = "packed"

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


def top_tokens(score: torch.Tensor, count: int) -> Choice:
    """[M, N] scores -> the `count` highest of each image."""
    return Choice(select_image_tokens(score, count), score, count=count)


def share(name: str, argument: str, value: Any, zero: bool = False) -> None:
    """`UserError` unless `value` is in (0, 1], or [0, 1) with `zero` (a share that goes)."""
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not (0 <= value < 1 if zero else 0 < value <= 1):
        bounds = "[0, 1): it is the share that goes, and something must stay" if zero else "(0, 1]"
        raise UserError(f"{name}: {argument}={value!r} is outside {bounds}")


def count(name: str, argument: str, value: Any) -> None:
    """`UserError` unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: {argument}={value!r} is not a positive integer")
