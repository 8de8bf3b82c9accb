"""Two or three policies in one: each decides its own kind of token (`fastv+h2o`, `image+structure`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import CACHE, IMAGE, OUTPUT, Choice, Gate, Patches, Policy
from dynllava_plugin.sparsity.cache import SparseContextCache

_WHAT = {IMAGE: "image tokens", OUTPUT: "output tokens", CACHE: "what leaves the cache"}


@dataclass(frozen=True, kw_only=True)
class Combined(Policy):
    """Hands each point to the one of `parts` that decides it."""

    parts: tuple[Policy, ...]

    name = "combined"  # each instance has its parts' names
    rule = "each of its parts"
    source = "its parts'"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "+".join(part.name for part in self.parts))
        owners: dict[str, Policy] = {}
        for part in self.parts:
            if not part.decides:
                raise UserError(f"{self.name}: {part.name} decides nothing, leave it out")
            for what in sorted(part.decides):
                if what in owners:
                    raise UserError(
                        f"{self.name}: {owners[what].name} and {part.name} both decide {_WHAT[what]}"
                    )
                owners[what] = part
        object.__setattr__(self, "decides", frozenset(owners))
        object.__setattr__(self, "predictors", frozenset().union(*(part.predictors for part in self.parts)))
        for name in ("uses_chance", "sequential", "reads_question", "reduces_patches"):
            object.__setattr__(self, name, any(getattr(part, name) for part in self.parts))
        object.__setattr__(self, "static_prefill", all(part.static_prefill for part in self.parts))
        object.__setattr__(self, "vision_layer", self._image.vision_layer)
        several = next((part.name for part in self.parts if part.several_gates), None)
        if several and CACHE in owners:
            raise UserError(
                f"{self.name}: {several} has gates at several layers, {owners[CACHE].name}'s cache begins at one; "
                "combine it with a policy of one gate"
            )
        layers = {part.name: part.gate_layer for part in self.parts if not _apart(part)}
        if len(set(layers.values())) > 1:
            found = " and ".join(f"{name} at layer {layer}" for name, layer in layers.items())
            raise UserError(f"{self.name}: {found}; give them the same layer")

    def _owner(self, what: str) -> Policy:
        return next((part for part in self.parts if what in part.decides), _NOTHING)

    @property
    def _image(self) -> Policy:
        return self._owner(IMAGE)

    def of_depth(self, num_layers: int) -> Combined:
        """Every part."""
        parts = tuple(part.of_depth(num_layers) for part in self.parts)
        return replace(self, parts=parts, num_layers=num_layers)

    @property
    def gate_layer(self) -> int:
        """The one that its parts share, or the first."""
        return min((part.gate_layer for part in self.parts if not part.at_input), default=1)

    @property
    def at_input(self) -> bool:  # type: ignore[override]
        """Whether the image tokens are chosen before the LLM."""
        return self._image.at_input

    @property
    def layers(self) -> tuple[int, ...]:
        """Every part's."""
        return tuple(sorted({layer for part in self.parts for layer in part.layers}))

    @property
    def splits(self) -> tuple[int, ...]:
        """Every part's."""
        return tuple(sorted({layer for part in self.parts for layer in part.splits}))

    @property
    def packed_positions(self) -> bool:
        """As the image policy's."""
        return self._image.packed_positions

    def kept_tokens(self, total: int) -> int:
        """As the image policy."""
        return self._image.kept_tokens(total)

    @property
    def output_share(self) -> float | None:
        """As the output policy's."""
        return self._owner(OUTPUT).output_share

    @property
    def cache_share(self) -> float:
        """As the cache policy's."""
        return self._owner(CACHE).cache_share

    @property
    def cache_output_share(self) -> float:
        """As the cache policy's."""
        return self._owner(CACHE).cache_output_share

    @property
    def image_seed(self) -> int | None:
        """As the image policy's."""
        return self._image.image_seed

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """As the image policy's."""
        return self._image.attention_layers

    @property
    def cache_rule(self) -> object:
        """As the cache policy's."""
        return self._owner(CACHE).cache_rule

    def asks_output(self, layer: int) -> bool:
        """As the output policy."""
        return self._owner(OUTPUT).asks_output(layer)

    def reduce_patches(self, patches: Patches) -> Choice:
        """As the image policy."""
        return self._image.reduce_patches(patches)

    def keep_image(self, gate: Gate) -> Choice | None:
        """As the image policy, at its gates."""
        return self._image.keep_image(gate) if gate.layer in self._image.layers else None

    def keep_output(self, gate: Gate) -> Choice | None:
        """As the output policy, at its gates."""
        owner = self._owner(OUTPUT)
        return owner.keep_output(gate) if gate.layer in owner.layers else None

    def new_cache(self, num_layers: int) -> SparseContextCache:
        """As the policy that decides what leaves it."""
        owner = self._owner(CACHE)
        return owner.new_cache(num_layers) if owner is not _NOTHING else super().new_cache(num_layers)

    def image_stages(self, total: float, kept: float, num_layers: int) -> tuple[tuple[int, float], ...]:
        """As the image policy."""
        return self._image.image_stages(total, kept, num_layers)

    def check_image(self, total: int) -> None:
        """As the image policy."""
        self._image.check_image(total)

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """Every part."""
        for part in self.parts:
            part.check(num_layers, text_predictor)


def _apart(part: Policy) -> bool:
    """Whether a part's gates may be elsewhere than the others'."""
    return part.at_input or part.several_gates


_NOTHING = Policy()
