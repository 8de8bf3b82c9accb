"""Methods that drop image tokens several times: their gates, and how many tokens each leaves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

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
    at: Any = None  # text once, then a tuple of layers
    ratio: float | None = argument(None, share)
    shares: Any = None  # likewise, of shares

    def __post_init__(self) -> None:
        for name, kind, fits, wanted in (
            ("at", int, _rise, "layers in order, such as 8-16-24"),
            ("shares", float, _fall, "shares in (0, 1] that fall, such as 0.5-0.25"),
        ):
            given = getattr(self, name)
            if given is None or isinstance(given, tuple):
                continue
            try:
                found = tuple(kind(part) for part in str(given).split("-"))
            except ValueError:
                found = ()
            if not found or not fits(found):
                raise UserError(f"{self.name}: {name}={given!r} is not {wanted}")
            object.__setattr__(self, name, found)

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the gates' layers; empty as long as no model is in sight."""
        layers = self.num_layers
        if self.at is not None or layers is None:
            return self.at or ()
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
            return self.shares
        return tuple(kept ** ((gate + 1) / self.number_of_gates) for gate in range(self.number_of_gates))

    def check(self) -> None:
        """Check as `ImagePolicy.check`, and where the gates are."""
        super().check()
        layers = self.layers
        if layers and self.shares is not None and len(self.shares) != len(layers):
            shares = "-".join(map(str, self.shares))
            raise UserError(
                f"{self.name}: shares={shares} names {len(self.shares)} gates, there are {len(layers)}"
            )
        if layers and layers[0] < 1:
            where = f"stages={self.stages} of {self.num_layers} layers"
            where = where if self.at is None else f"at={'-'.join(map(str, self.at))}"
            raise UserError(f"{self.name}: {where} puts a gate at layer 0; it ranks by the layer before")
        if layers:
            self.inside(layers[-1])


def _rise(layers: tuple[Any, ...]) -> bool:
    return all(earlier < later for earlier, later in pairwise(layers))


def _fall(shares: tuple[Any, ...]) -> bool:
    return all(0 < later <= earlier for earlier, later in pairwise((1.0, *shares)))
