"""What tables call a run's sparsity settings."""

from __future__ import annotations

from typing import Any

from dynllava_plugin.policies.registry import arguments_of, describe, parse_policy


def mode_name(sparsity: dict[str, Any], default_rate: float = 0.2) -> str:
    """A run's name in tables: ``image_text``, ``random`` (the control), ``...@10%`` at another keep rate."""
    if sparsity.get("policy"):
        return _policy_name(sparsity, default_rate)
    mode = str(sparsity.get("mode", "unknown"))
    if mode == "full":
        return mode
    if sparsity.get("image_policy", "learned") != "learned":
        # The control: the same checkpoint and mode, but another chooses the image tokens.
        mode = str(sparsity["image_policy"]) if mode == "image_text" else f"{sparsity['image_policy']}_{mode}"
    rate = float(sparsity.get("vision_keep_rate", default_rate))
    return mode if rate == default_rate else f"{mode}@{100 * rate:g}%"


def _policy_name(sparsity: dict[str, Any], default_rate: float) -> str:
    """``fastv,k=3,r=0.75``; ``visionzip@10%`` where the keep rate is the model's setting."""
    name, arguments = parse_policy(describe(str(sparsity["policy"]), sparsity.get("policy_args") or {}))
    label = describe(name, arguments)
    rate = float(sparsity.get("vision_keep_rate", default_rate))
    budgeted = "keep" in arguments_of(name) and not {"keep", "r", "n"} & {
        key.rpartition(".")[2] for key in arguments
    }
    return label if rate == default_rate or not budgeted else f"{label}@{100 * rate:g}%"
