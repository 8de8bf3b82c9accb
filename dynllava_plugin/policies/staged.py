"""Methods that drop image tokens several times: their gates, and how many tokens each leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import Choice, Gate, ImagePolicy, count, share, top_tokens
from dynllava_plugin.sparsity.selection import num_kept_image_tokens


@dataclass(frozen=True, kw_only=True)
class StagedPolicy(ImagePolicy):
    """Behind gate j the share ratio^j of each image's tokens stays.

    The gates are at the class's `depths`, shares of the model's layers, or at the layers `at`, written 8-16-24; `stages` says
    how many there are where they divide the layers evenly. `ratio` is the share that a gate leaves of what reaches it; without
    it `keep` is the share behind the last gate, and `tokens` is solved for the ratio. `shares`, written 0.5-0.25-0.01, are the
    shares of the image behind each gate, for a published schedule that isn't geometric.
    """

    layer_argument: ClassVar[str | None] = None
    follows: ClassVar[bool] = False
    depths: ClassVar[tuple[float, ...]] = ()

    stages: int = 3
    at: str | int | None = None
    ratio: float | None = None
    shares: str | float | None = None

    def gates(self, num_layers: int | None = None) -> tuple[int, ...]:
        """Return the gates' layers in a model of `num_layers` layers (default: its own)."""
        if self.at is not None:
            return tuple(int(part) for part in str(self.at).split("-"))
        layers = self.num_layers if num_layers is None else num_layers
        if layers is None:
            return ()
        if not self.depths:
            return tuple(stage * layers // (self.stages + 1) for stage in range(1, self.stages + 1))
        found: list[int] = []
        for depth in self.depths:  # in a shallow model one behind the other
            found.append(max(int(depth * layers), found[-1] + 1 if found else 1))
        return tuple(found)

    @property
    def layers(self) -> tuple[int, ...]:
        """As `gates`; empty as long as no model is in sight."""
        return self.gates()

    def left(self, total: int, gates: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many of an image's `total` tokens stay behind each gate."""
        if self.shares is not None:
            return tuple(num_kept_image_tokens(total, float(part)) for part in str(self.shares).split("-"))
        if self.tokens is None:
            ratio = self.keep ** (1 / len(gates)) if self.ratio is None else self.ratio
            return _counts(total, ratio, len(gates))
        layers = self.depth
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
        """Return how many stay behind the last gate; of a number of gates, where they are isn't asked."""
        gates = self.layers or tuple(range(1, len(self.depths or range(self.stages)) + 1))
        return self.left(total, gates)[-1]

    def image_stages(self, total: float, kept: float, num_layers: int) -> tuple[tuple[int, float], ...]:
        """As `left`; where `total` and `kept` are sums or means over images, each gate's share of them is the same."""
        gates, whole = self.gates(num_layers), int(total)
        if self.shares is not None:
            return tuple(
                (g, total * n / max(whole, 1)) for g, n in zip(gates, self.left(whole, gates), strict=True)
            )
        if whole == total:
            left = self.of_depth(num_layers).left(whole, gates)
            if left[-1] == kept:  # of one image, to the token
                return tuple(zip(gates, left, strict=True))
        ratio = (kept / total) ** (1 / len(gates)) if total else 1.0
        return tuple((layer, total * ratio ** (stage + 1)) for stage, layer in enumerate(gates))

    def budget(self, gate: Gate) -> int:
        """Return how many tokens of each image in question stay behind this gate."""
        return self.left(gate.whole_image, self.layers)[self.layers.index(gate.layer)]

    def keep_image(self, gate: Gate) -> Choice:
        """Return the tokens of the highest score among those that are left."""
        return top_tokens(self.score(gate), self.budget(gate))

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
        if self.shares is not None:
            self._check_shares(len(gates))
        if gates and gates[0] < 1:
            where = f"at={self.at}" if self.at is not None else f"stages={self.stages} of {num_layers} layers"
            raise UserError(f"{self.name}: {where} puts a gate at layer 0; it ranks by the layer before")
        if gates:
            self.inside(gates[-1], num_layers)
        super().check(num_layers, text_predictor)

    def _check_shares(self, gates: int) -> None:
        """Raise `UserError` unless `shares` are shares that fall, one a gate."""
        try:
            shares = [float(part) for part in str(self.shares).split("-")]
        except ValueError:
            shares = []
        falling = all(
            0 < later <= earlier <= 1 for earlier, later in zip((1.0, *shares), shares, strict=False)
        )
        if not shares or not falling:
            raise UserError(
                f"{self.name}: shares={self.shares!r} is not shares in (0, 1] that fall, such as 0.5-0.25"
            )
        if gates and len(shares) != gates:
            raise UserError(f"{self.name}: shares={self.shares} names {len(shares)} gates, there are {gates}")


def _counts(total: int, ratio: float, stages: int) -> tuple[int, ...]:
    return tuple(num_kept_image_tokens(total, ratio ** (stage + 1)) for stage in range(stages))
