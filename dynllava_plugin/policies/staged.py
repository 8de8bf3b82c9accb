"""Methods that drop image tokens several times: their gates, and how many tokens each leaves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import ImagePolicy, argument, count, share


@dataclass(frozen=True, kw_only=True)
class StagedPolicy(ImagePolicy):
    """Behind gate j the share ratio^j of each image's tokens stays.

    The gates are at the class's `depths`, shares of the model's layers, or at the layers `at`, written 8-16-24; `stages` says
    how many there are where they divide the layers evenly. `ratio` is the share that a gate leaves of what reaches it; without
    it `keep` is the share behind the last gate, and `tokens` is solved for that. `shares`, written 0.5-0.25-0.01, are the
    shares of the image behind each gate, for a published schedule that isn't geometric.
    """

    layer_argument: ClassVar[str | None] = None
    follows: ClassVar[bool] = False
    depths: ClassVar[tuple[float, ...]] = ()

    stages: int = argument(3, count)
    at: str | int | None = None
    ratio: float | None = argument(None, share)
    shares: str | float | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the gates' layers; empty as long as no model is in sight."""
        if self.at is not None:
            return tuple(int(part) for part in str(self.at).split("-"))
        layers = self.num_layers
        if layers is None:
            return ()
        if not self.depths:
            return tuple(stage * layers // (self.stages + 1) for stage in range(1, self.stages + 1))
        found: list[int] = []
        for depth in self.depths:  # in a shallow model one behind the other
            found.append(max(int(depth * layers), found[-1] + 1 if found else 1))
        return tuple(found)

    @property
    def number_of_gates(self) -> int:
        """Return how many there are, which is known before the model is."""
        return len(self.layers or self.depths) or self.stages

    @property
    def kept_share(self) -> float:
        """Return the share behind the last gate."""
        return self.keep if self.ratio is None else self.ratio**self.number_of_gates

    def shares_left(self, kept: float) -> tuple[float, ...]:
        """Return `shares`, else ones that fall alike at each gate."""
        if self.shares is not None:
            return tuple(float(part) for part in str(self.shares).split("-"))
        return tuple(kept ** ((gate + 1) / self.number_of_gates) for gate in range(self.number_of_gates))

    def check(self) -> None:
        """Check as `ImagePolicy.check`, and where the gates are."""
        super().check()
        if self.at is not None:
            parts = str(self.at).split("-")
            layers = [int(part) for part in parts if part.isdecimal()]
            if len(layers) < len(parts) or sorted(set(layers)) != layers:
                raise UserError(f"{self.name}: at={self.at!r} is not layers in order, such as 8-16-24")
        if self.shares is not None:
            self._check_shares()
        if self.layers and self.layers[0] < 1:
            where = (
                f"at={self.at}"
                if self.at is not None
                else f"stages={self.stages} of {self.num_layers} layers"
            )
            raise UserError(f"{self.name}: {where} puts a gate at layer 0; it ranks by the layer before")
        if self.layers:
            self.inside(self.layers[-1])

    def _check_shares(self) -> None:
        """Raise `UserError` unless `shares` are shares that fall, one a gate."""
        try:
            shares = [1.0, *self.shares_left(1.0)]
        except ValueError:
            shares = [0.0, 1.0]
        if any(not 0 < later <= earlier for earlier, later in pairwise(shares)):
            raise UserError(
                f"{self.name}: shares={self.shares!r} is not shares in (0, 1] that fall, such as 0.5-0.25"
            )
        if self.layers and len(shares) - 1 != len(self.layers):
            raise UserError(
                f"{self.name}: shares={self.shares} names {len(shares) - 1} gates, there are {len(self.layers)}"
            )
