"""What a policy leaves of a prompt and its answer, as FLOPs and bytes are counted."""

from __future__ import annotations

from dynllava_plugin.flops import Context
from dynllava_plugin.policies.base import CACHE, IMAGE, OUTPUT, Policy


def context_of(
    policy: Policy, layers: int, images: float, kept: float, text: float, predicted_text_keep: float = 1.0
) -> Context:
    """The context behind `policy` in a model of `layers` layers.

    Parameters
    ----------
    images, kept, text : float
        Image tokens of the prompt, those that stay behind the last gate, and its text tokens; may be means over samples.
    predicted_text_keep : float
        Share of the output tokens that the text predictor keeps, for a policy that asks it.

    Notes
    -----
    What chooses the tokens besides the predictors (one row of attention, a similarity matrix) is not counted; it is in a
    measured time.
    """
    policy = policy.of_depth(layers)
    share = policy.output_share
    text_keep = predicted_text_keep if share is None else share
    stages = dict(policy.image_stages(images, kept, layers))
    present = stages.pop(0, images)  # what enters the LLM
    starts = set(stages)
    if CACHE in policy.decides:
        starts.add(policy.gate_layer)
    output_gate = next((layer for layer in policy.layers if policy.asks_output(layer)), layers)
    if OUTPUT in policy.decides:
        starts.add(output_gate)
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
        held_share=policy.cache_share,
        held_output_share=policy.cache_output_share,
        later=tuple(gates[1:]),
    )
