"""Equivalent tokens and exact FLOPs of a policy's prefill, from the counts of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynllava_plugin.flops import DecoderShape, prefill_flops
from dynllava_plugin.policies import Policy
from dynllava_plugin.policies.contexts import context_of


def prefill_costs(shape: DecoderShape, policy: Policy, counts: Mapping[str, Any]) -> dict[str, float]:
    """Return ``equivalent_tokens`` and ``prefill_gflops`` of samples with the mean `counts` of `mean_counts`; empty without images."""
    total = counts.get("image_tokens")
    kept = counts.get("kept_image_tokens")
    if not total or kept is None:
        return {}
    context = context_of(policy, shape.layers, total, kept, counts["prompt_tokens"] - total)
    return {
        "equivalent_tokens": policy.image_tokens(total, kept, shape.layers),
        "prefill_gflops": prefill_flops(shape, context) / 1e9,
    }
