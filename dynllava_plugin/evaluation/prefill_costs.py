"""Equivalent tokens and exact FLOPs of a policy's prefill, from the counts of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynllava_plugin.flops import Context, DecoderShape, prefill_flops
from dynllava_plugin.policies import Policy
from dynllava_plugin.policies.base import IMAGE, OUTPUT


def context_of(policy: Policy, prompt: float, images: float, kept: float, num_layers: int) -> Context:
    """What the policy leaves of a prompt of `prompt` tokens, `images` of them image tokens, of which `kept` stay.

    Numbers may be means over samples. What chooses the tokens besides the predictors (one row of attention, a
    similarity matrix) is not counted; it is in the measured time.
    """
    decides = IMAGE in policy.decides
    split = num_layers if not decides else 0 if policy.at_input else policy.gate_layer
    return Context(
        split=split,
        images=images,  # type: ignore[arg-type]
        kept_images=kept if decides else images,  # type: ignore[arg-type]
        text=prompt - images,  # type: ignore[arg-type]
        image_predictor=IMAGE in policy.predictors,
        text_predictor=OUTPUT in policy.predictors,
    )


def prefill_costs(shape: DecoderShape, policy: Policy, counts: Mapping[str, Any]) -> dict[str, float]:
    """``equivalent_tokens`` and ``prefill_gflops`` of samples with the mean `counts` of `mean_counts`; empty without images."""
    total = counts.get("image_tokens")
    kept = counts.get("kept_image_tokens")
    if not total or kept is None:
        return {}
    context = context_of(policy, counts["prompt_tokens"], total, kept, shape.layers)
    return {
        "equivalent_tokens": policy.image_tokens(total, kept, shape.layers),
        "prefill_gflops": prefill_flops(shape, context) / 1e9,
    }
