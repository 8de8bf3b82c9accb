"""PyramidDrop: fewer and fewer image tokens, at several gates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import Choice, Gate, ImagePolicy, count, share, top_tokens
from dynllava_plugin.sparsity.selection import num_kept_image_tokens


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(ImagePolicy):
    """Behind gate j of `stages` the share ratio^j of each image's tokens stays, those that the last prompt token attends to most.

    The gates divide the layers evenly (8, 16 and 24 of 32), or are those of `at`, written 8-16-24. `ratio` is the paper's
    lambda, 0.5 there; without it `keep` is the share behind the last gate. `tokens` is solved for the ratio.

    Notes
    -----
    The published code ranks with the projections of the layer behind the gate on the states that enter it, a second time
    beside the layer itself; here the attention is the layer's before the gate, as FastV's. The budget holds for each image of
    a prompt; the published code has one image.
    """

    name = "pyramiddrop"
    rule = "image tokens that the last prompt token attends to most, fewer at each of several gates"
    source = "arXiv 2410.17247"
    several_gates = True
    follows = False

    stages: int = 3
    at: str | int | None = None
    ratio: float | None = None

    def gates(self, num_layers: int | None = None) -> tuple[int, ...]:
        """The gates' layers in a model of `num_layers` layers (default: its own)."""
        if self.at is not None:
            return tuple(int(part) for part in str(self.at).split("-"))
        layers = self.num_layers if num_layers is None else num_layers
        if layers is None:
            return ()
        return tuple(stage * layers // (self.stages + 1) for stage in range(1, self.stages + 1))

    @property
    def layers(self) -> tuple[int, ...]:
        """As `gates`; empty as long as no model is in sight."""
        return self.gates()

    @property
    def gate_layer(self) -> int:
        """The first gate's."""
        return next(iter(self.layers), 1)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layer before each gate."""
        return tuple(layer - 1 for layer in self.layers)

    def left(self, total: int, gates: tuple[int, ...]) -> tuple[int, ...]:
        """How many of an image's `total` tokens stay behind each gate."""
        if self.tokens is None:
            ratio = self.keep ** (1 / len(gates)) if self.ratio is None else self.ratio
            return _counts(total, ratio, len(gates))
        layers = self._depth
        widths = [end - start for start, end in zip((0, *gates), (*gates, layers), strict=True)]

        def mean(ratio: float) -> float:
            counts = (total, *_counts(total, ratio, len(gates)))
            return math.fsum(width * n for width, n in zip(widths, counts, strict=True)) / layers

        low, high = 0.0, 1.0
        self.reached(mean(low) <= self.tokens, mean(low), total)
        if mean(high) <= self.tokens:
            return (total,) * len(gates)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) <= self.tokens else (low, middle)
        return _counts(total, low, len(gates))

    def kept_tokens(self, total: int) -> int:
        """Behind the last gate; of a number of gates, where they are isn't asked."""
        gates = self.layers or tuple(range(1, self.stages + 1))
        return self.left(total, gates)[-1]

    def image_stages(self, total: float, kept: float, num_layers: int) -> tuple[tuple[int, float], ...]:
        """As `left`; where `total` and `kept` are sums or means over images, each gate's share of them is the same."""
        gates, whole = self.gates(num_layers), int(total)
        if whole == total:
            left = self.of_depth(num_layers).left(whole, gates)
            if left[-1] == kept:  # of one image, to the token
                return tuple(zip(gates, left, strict=True))
        ratio = (kept / total) ** (1 / len(gates)) if total else 1.0
        return tuple((layer, total * ratio ** (stage + 1)) for stage, layer in enumerate(gates))

    def keep_image(self, gate: Gate) -> Choice:
        """By `Gate.attention` among those that are left."""
        assert gate.attention is not None
        score = gate.of_images(gate.attention)
        stage = self.layers.index(gate.layer)
        return top_tokens(score, self.left(gate.whole_image, self.layers)[stage])

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `ImagePolicy.check`, and where the gates are."""
        count(self.name, "stages", self.stages)
        if self.ratio is not None:
            share(self.name, "ratio", self.ratio)
        if self.at is not None:
            parts = str(self.at).split("-")
            if not all(part.isdecimal() for part in parts) or sorted(set(map(int, parts))) != [
                *map(int, parts)
            ]:
                raise UserError(f"{self.name}: at={self.at!r} is not layers in order, such as 8-16-24")
        gates = self.gates(num_layers)
        if gates and gates[0] < 1:
            where = f"at={self.at}" if self.at is not None else f"stages={self.stages} of {num_layers} layers"
            raise UserError(f"{self.name}: {where} puts a gate at layer 0; it ranks by the layer before")
        if num_layers is not None and gates[-1] >= num_layers:
            raise UserError(
                f"{self.name}: layer {gates[-1]} is outside the model, which has layers 0..{num_layers - 1}"
            )
        super().check(num_layers, text_predictor)


def _counts(total: int, ratio: float, stages: int) -> tuple[int, ...]:
    return tuple(num_kept_image_tokens(total, ratio ** (stage + 1)) for stage in range(stages))
