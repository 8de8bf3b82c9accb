"""A schedule of one's own: image policies at layers of one's choice, `schedule,2:fastv:0.5,6:random:0.3`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import Choice, Gate, ImagePolicy
from dynllava_plugin.sparsity.selection import num_kept_image_tokens


@dataclass(frozen=True, kw_only=True)
class Schedule(ImagePolicy):
    """Image policies one behind the other; behind each, its `keep` is the share of the whole image's tokens that is left.

    The first may act before the LLM (layer 0), in the vision tower too; the others act in it.
    """

    name = "schedule"
    rule = "image policies at layers of one's choice"
    source = "a user's own"
    layer_argument: ClassVar[str | None] = None

    steps: tuple[ImagePolicy, ...] = ()

    def __post_init__(self) -> None:
        for earlier, later in zip(self.steps, self.steps[1:], strict=False):
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

    @property
    def first(self) -> ImagePolicy:
        """Return the first step."""
        return self.steps[0]

    def of_depth(self, num_layers: int) -> Schedule:
        """Every step."""
        return replace(self, steps=tuple(x.of_depth(num_layers) for x in self.steps), num_layers=num_layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """Every step's."""
        return tuple(step.layers[0] for step in self.steps)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Every step's."""
        return tuple(layer for step in self.steps for layer in step.attention_layers)

    def keep_image(self, gate: Gate) -> Choice:
        """As the step at this gate, with its share of the whole image as one of the tokens that are left."""
        step, whole, left = self.steps[self.layers.index(gate.layer)], gate.whole_image, gate.tokens_per_image
        kept = min(num_kept_image_tokens(whole, step.keep), left)
        return replace(step, keep=kept / left).keep_image(gate)

    def named_tokens(self, total: int) -> int:
        """Return how many stay behind the last step."""
        return self.steps[-1].kept_tokens(total)

    def image_stages(self, total: float, kept: float, num_layers: int) -> tuple[tuple[int, float], ...]:
        """Every step's; shares of `total` where it is a sum or a mean over images."""
        whole = int(total)
        found = [step.kept_tokens(whole) if whole == total else step.keep * total for step in self.steps]
        return tuple(zip(self.layers, [*found[:-1], kept], strict=True))

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """Every step's."""
        for step in self.steps:
            step.check(num_layers, text_predictor)


def schedule_of(text: str, make: Any) -> Schedule:
    """Return the schedule of steps written `layer:policy:share-layer:policy:share`; `make(name, layer, keep)` gives an image policy.

    Raises
    ------
    UserError
        Naming the step that can't be one.
    """
    steps = []
    for part in filter(None, text.split("-")):
        layer, _, rest = part.partition(":")
        name, _, keep = rest.partition(":")
        try:
            at, share = int(layer), float(keep)
        except ValueError:
            raise UserError(f"schedule: {part!r} is not layer:policy:share, such as 6:random:0.3") from None
        step = make(name, at, share)
        if (
            not isinstance(step, ImagePolicy)
            or isinstance(step, Schedule)
            or (at > 0) != bool(step.layer_argument)
        ):
            acts = "has gates of its own" if isinstance(step, ImagePolicy) and at > 0 else "doesn't act there"
            raise UserError(
                f"schedule: {part!r}: {name} {acts}; choose an image policy with a layer, or at 0 one before the LLM"
            )
        steps.append(step)
    if not steps:
        raise UserError("schedule: give its steps, such as schedule,2:fastv:0.5,6:random:0.3")
    return Schedule(steps=tuple(sorted(steps, key=lambda step: step.layers[0])))
