"""What tables call a run's sparsity settings."""

from __future__ import annotations

from typing import Any


def mode_name(sparsity: dict[str, Any], default_rate: float = 0.2) -> str:
    """A run's name in tables: ``image_text``, ``random`` (the control), ``...@10%`` at another keep rate."""
    mode = str(sparsity.get("mode", "unknown"))
    if mode == "full":
        return mode
    if sparsity.get("image_policy", "learned") != "learned":
        # The control: the same checkpoint and mode, but another chooses the image tokens.
        mode = str(sparsity["image_policy"]) if mode == "image_text" else f"{sparsity['image_policy']}_{mode}"
    rate = float(sparsity.get("vision_keep_rate", default_rate))
    return mode if rate == default_rate else f"{mode}@{100 * rate:g}%"
