"""A schedule of one's own: image policies at layers of one's choice, `schedule,2:fastv:0.5,6:random:0.3`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import Choice, Gate, ImagePolicy, Patches


@dataclass(frozen=True, kw_only=True)
class Schedule(ImagePolicy):
    """Image policies one behind the other; behind each, its `keep` is the share of the whole image's tokens that is left.

    The first may act before the LLM (layer 0), in the vision tower too; the others act in it. With `tokens` the shares are
    multiplied by what makes them fit, and none becomes more than 1.
    """

    name = "schedule"
    rule = "image policies at layers of one's choice"
    source = "a user's own"
    layer_argument: ClassVar[str | None] = None

    keep: float = field(default=1.0, metadata={"argument": False})
    steps: tuple[ImagePolicy, ...] = ()

    def __post_init__(self) -> None:
        for earlier, later in pairwise(self.steps):
            if later.layers[0] == earlier.layers[0]:
                raise UserError(f"{self.name}: two steps at layer {later.layers[0]}; give one")
            if later.keep > earlier.keep:
                raise UserError(
                    f"{self.name}: {later.name} at layer {later.layers[0]} keeps {later.keep} of an image, but "
                    f"{earlier.name} leaves {earlier.keep} before it"
                )
        for name in ("uses_chance", "reads_question", "learned"):
            object.__setattr__(self, name, any(getattr(step, name) for step in self.steps))
        object.__setattr__(self, "seed", max((getattr(step, "seed", 0) for step in self.steps), default=0))
        object.__setattr__(self, "needs", next((step.needs for step in self.steps if step.needs), None))

    @property
    def first(self) -> ImagePolicy:
        """Return the first step."""
        return self.steps[0]

    def of_depth(self, num_layers: int) -> Schedule:
        """Return the same schedule in a model of `num_layers` layers."""
        return replace(self, steps=tuple(x.of_depth(num_layers) for x in self.steps), num_layers=num_layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """Return every step's."""
        return tuple(step.layers[0] for step in self.steps)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Return every step's."""
        return tuple(layer for step in self.steps for layer in step.attention_layers)

    @property
    def kept_share(self) -> float:
        """Return the last step's."""
        return self.steps[-1].keep

    def shares_left(self, kept: float) -> tuple[float, ...]:
        """Return every step's share, in the proportions that the steps were given in."""
        return tuple(min(1.0, kept * (step.keep / self.steps[-1].keep)) for step in self.steps)

    def keep_image(self, gate: Gate) -> Choice:
        """Keep what the step at this gate does."""
        step = self.steps[self.layers.index(gate.layer)]
        return replace(step, keep=self.budget(gate) / gate.whole_image).keep_image(gate)

    def reduce_patches(self, patches: Patches) -> Choice:
        """Reduce as the first step, which acts in the vision tower."""
        total = patches.hidden.shape[1]
        return replace(self.first, keep=self.left(total)[0] / total).reduce_patches(patches)  # type: ignore[attr-defined]

    def check(self) -> None:
        """Check as `ImagePolicy.check`, and every step."""
        super().check()
        for step in self.steps:
            step.check()
