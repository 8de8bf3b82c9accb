"""What a policy leaves of a prompt and its answer, as FLOPs and bytes are counted."""

from __future__ import annotations

from dynllava_plugin.flops import Context
from dynllava_plugin.policies.base import IMAGE, OUTPUT
from dynllava_plugin.policies.policy import Policy


def context_of(
    policy: Policy, layers: int, images: float, kept: float, text: float, predicted_text_keep: float = 1.0
) -> Context:
    """Return the context behind `policy` in a model of `layers` layers.

    The prompt has `images` image tokens, of which `kept` stay behind the last gate, and `text` text tokens; they may be means
    over samples. `predicted_text_keep` is the share of output tokens that the text predictor keeps, for a policy that asks it.

    What chooses the tokens besides the predictors (one row of attention, a similarity matrix) is not counted; it is in a
    measured time.
    """
    policy = policy.of_depth(layers)
    image, output, cache = policy.image, policy.output, policy.cache
    share = output.output_share if output else 1.0
    text_keep = predicted_text_keep if share is None else share
    stages = dict(image.image_stages(images, kept)) if image else {}
    present = stages.pop(0, images)  # what enters the LLM
    starts = set(stages)
    output_gate = output.layers[0] if output else layers
    starts |= {part.layers[0] for part in (output, cache) if part}
    left, gates = present, []
    for layer in sorted(starts):
        left = stages.get(layer, left)
        gates.append((layer, left, text_keep if layer >= output_gate else 1.0))
    split, first, first_text = gates[0] if gates else (layers, present, 1.0)
    return Context(
        split=split,
        images=present,  # type: ignore[arg-type]
        kept_images=first,  # type: ignore[arg-type]
        text=text,  # type: ignore[arg-type]
        text_keep=first_text,
        image_predictor=IMAGE in policy.predictors,
        text_predictor=OUTPUT in policy.predictors,
        held_share=cache.r if cache else 1.0,
        held_output_share=cache.output_share if cache else 1.0,
        later=tuple(gates[1:]),
    )
