"""The one table of what the benchmark compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import Context
from dynllava_plugin.sparsity.selection import num_kept_image_tokens


@dataclass(frozen=True)
class Mode:
    """A way to treat the context.

    Parameters
    ----------
    name : str
        As on the command line.
    title : str
        As in tables and plots.
    sparsity : dict
        Arguments of `set_sparsity`.
    split : int, optional
        First layer with fewer tokens; None: nothing is dropped.
    keep_rate : float, optional
        Share of the image tokens that stay; None: the one asked for.
    drops_text, image_predictor : bool
        Whether output tokens are dropped by the text predictor; whether the image predictor runs.
    """

    name: str
    title: str
    sparsity: dict[str, Any] = field(default_factory=dict)
    split: int | None = None
    keep_rate: float | None = None
    drops_text: bool = False
    image_predictor: bool = False

    def context(self, layers: int, images: int, text: int, vision_rate: float, text_rate: float) -> Context:
        """What this mode leaves of a prompt with `images` image tokens and `text` text tokens."""
        if self.split is None:
            return Context(layers, images, images, text)
        kept = num_kept_image_tokens(images, self.keep_rate or vision_rate)
        return Context(
            self.split,
            images,
            kept,
            text,
            text_rate if self.drops_text else 1.0,
            self.image_predictor,
            self.drops_text,
        )


MODES = {
    mode.name: mode
    for mode in (
        Mode("full", "full context", {"mode": "full"}),
        Mode("image", "Dynamic-LLaVA I", {"mode": "image"}, split=2, image_predictor=True),
        Mode("image_text", "Dynamic-LLaVA I|T", {"mode": "image_text"}, 2, None, True, True),
        Mode("fastv", "FastV (k=3, r=0.75)", {"policy": "fastv,k=3,r=0.75"}, split=3, keep_rate=0.25),
    )
}


def modes_named(names: str) -> list[Mode]:
    """Modes from a comma-separated list; "full", which the others are compared with, comes first and always."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in MODES]
    if unknown or not wanted:
        raise UserError(f"--mode: {', '.join(unknown) or 'empty'}; choose from {', '.join(MODES)}")
    return [MODES[name] for name in dict.fromkeys(["full", *wanted])]
