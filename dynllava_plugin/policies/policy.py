"""What the model asks: who decides on image tokens, who on output tokens, who on the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import (
    CACHE,
    IMAGE,
    OUTPUT,
    PROMPT,
    CachePolicy,
    Choice,
    Gate,
    ImagePolicy,
    OutputPolicy,
    Part,
    mean_tokens,
)
from dynllava_plugin.policies.learned import LearnedPrompt
from dynllava_plugin.sparsity.cache import SparseContextCache

_WHAT = {
    IMAGE: "image tokens",
    OUTPUT: "output tokens",
    PROMPT: "prompt text",
    CACHE: "what leaves the cache",
}


@dataclass(frozen=True)
class Policy:
    """Methods that decide different things, at most one of each kind; nothing is dropped that none of them decides."""

    name: str = "full"  # as a user writes it, without arguments: `fastv+h2o`
    image: ImagePolicy | None = None
    output: OutputPolicy | None = None
    cache: CachePolicy | None = None
    prompt: LearnedPrompt | None = None

    @classmethod
    def of(cls, name: str, parts: list[Part]) -> Policy:
        """Return the policy of `parts`, or raise `UserError` where two of them don't go together."""
        owners: dict[str, Part] = {}
        for part in parts:
            if not part.decides and len(parts) > 1:
                raise UserError(f"{name}: {part.name} decides nothing, leave it out")
            for what in part.decides:
                if what in owners:
                    raise UserError(f"{name}: {owners[what].name} and {part.name} both decide {_WHAT[what]}")
                owners[what] = part
        made = cls(name, **owners)  # type: ignore[arg-type]
        image, cache = made.image, made.cache
        if image and cache and (len(image.layers) > 1 or not (image.layer_argument or image.at_input)):
            raise UserError(
                f"{name}: {image.name} has gates at several layers, {cache.name}'s cache begins at one; "
                "combine it with a policy of one gate"
            )
        layers = {part.name: part.layers[0] for part in made.parts if part.layer_argument}
        if len(set(layers.values())) > 1:
            found = " and ".join(f"{part} at layer {layer}" for part, layer in layers.items())
            raise UserError(f"{name}: {found}; give them the same layer")
        return made

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Return the methods that it is made of."""
        return tuple(part for part in (self.image, self.output, self.prompt, self.cache) if part is not None)

    def of_depth(self, num_layers: int) -> Policy:
        """Return the same policy in a model of `num_layers` layers."""
        parts: dict[str, Any] = {next(iter(part.decides)): part.of_depth(num_layers) for part in self.parts}
        return replace(self, **parts)

    @cached_property
    def decides(self) -> frozenset[str]:
        """Return what is dropped: IMAGE, OUTPUT and CACHE."""
        return frozenset().union(*(part.decides for part in self.parts))

    @cached_property
    def predictors(self) -> frozenset[str]:
        """Return which of the checkpoint's predictors it asks: IMAGE and OUTPUT."""
        return frozenset().union(*(part.decides for part in self.parts if part.learned))

    @cached_property
    def sequential(self) -> bool:
        """Return whether a step depends on what earlier steps did: no run without a cache, no scoring in one pass."""
        return self.cache is not None

    @cached_property
    def reads_question(self) -> bool:
        """Return whether what is dropped may depend on the prompt's words (see `Part.reads_question`)."""
        return any(part.reads_question for part in self.parts)

    @cached_property
    def needs(self) -> frozenset[str]:
        """Return what it needs of a family (see `Part.needs`)."""
        return frozenset(part.needs for part in self.parts if part.needs)

    @cached_property
    def static_prefill(self) -> bool:
        """Return whether a prefill can be captured (see `Part.static_prefill`)."""
        one_gate = self.image is None or (self.image.fixed and len(self.image.layers) == 1)
        return one_gate and all(part.static_prefill for part in self.parts)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers at whose input there is a gate, in order; 0 is before the LLM."""
        gates = [part.layers for part in self.parts if part is not self.cache]
        return tuple(sorted({layer for layers in gates for layer in layers}))

    @cached_property
    def splits(self) -> tuple[int, ...]:
        """Layers from which on a cache holds other tokens than before; each begins a track."""
        cut = self.cache.splits if self.cache else ()
        return tuple(sorted({layer for layer in (*self.layers, *cut) if layer > 0}))

    @cached_property
    def gate_layer(self) -> int:
        """Return the first layer with a reduced context; of no consequence where all is decided before the LLM."""
        return min((layer for part in self.parts for layer in part.layers if layer > 0), default=1)

    @cached_property
    def at_input(self) -> bool:
        """Return whether image tokens are dropped before the LLM."""
        return self.image is not None and self.image.first.at_input

    @cached_property
    def reduces_patches(self) -> bool:
        """Return whether image tokens are chosen in the vision tower."""
        return self.image is not None and self.image.first.reduces_patches

    @cached_property
    def packed_positions(self) -> bool:
        """Return whether tokens behind a removed one move up."""
        return self.image is not None and self.image.first.packed_positions

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention the gate behind them looks at."""
        return self.image.attention_layers if self.image else ()

    @cached_property
    def image_seed(self) -> int | None:
        """Return what an image's own seed is mixed with; None where nothing is left to chance."""
        chance = self.image is not None and self.image.uses_chance
        return int(getattr(self.image, "seed", 0)) if chance else None

    @cached_property
    def cache_rule(self) -> Any:
        """Return what the KV cache must have been made for; None where nothing leaves it."""
        return self.cache.cache_rule if self.cache else None

    def asks_output(self, layer: int) -> bool:
        """Return whether the gate at `layer` decides on output text, so that a decoding step has to ask it."""
        return self.output is not None and layer in self.output.layers

    def keep_image(self, gate: Gate) -> Choice | None:
        """Return which tokens of the images in question stay; None keeps all."""
        image = self.image
        return image.keep_image(gate) if image is not None and gate.layer in image.layers else None

    def keep_output(self, gate: Gate) -> Choice | None:
        """Return which output tokens stay as context, bool [B, L - output_start]; None keeps all."""
        output = self.output
        return output.keep_output(gate) if output is not None and gate.layer in output.layers else None

    def new_cache(self, num_layers: int) -> SparseContextCache:
        """Return an empty KV cache."""
        return self.cache.new_cache(num_layers) if self.cache else SparseContextCache(num_layers, self.splits)

    def kept_tokens(self, total: int) -> int:
        """Return how many of an image's `total` tokens stay in the end."""
        return self.image.kept_tokens(total) if self.image else total

    def image_tokens(self, total: float, kept: float, num_layers: int) -> float:
        """Return equivalent tokens: the mean over the LLM's layers of the image tokens present, `kept` of `total` in the end."""
        stages = self.image.of_depth(num_layers).image_stages(total, kept) if self.image else ()
        return mean_tokens(stages, total, num_layers)

    def check_image(self, total: int) -> None:
        """Raise `UserError` for a budget that an image of `total` tokens can't have; for models whose images all have so many."""
        if self.image:
            self.image.check_image(total)

    def check(self, text_predictor: bool = True) -> None:
        """Raise `UserError` for an argument out of range or a policy that doesn't fit the model."""
        for part in self.parts:
            part.check()
        if OUTPUT in self.predictors and not text_predictor:
            raise UserError(
                f"{self.name}: needs an output-text predictor, which this checkpoint lacks; use 'image'"
            )
