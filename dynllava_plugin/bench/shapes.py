"""Model shapes by name or as LAYERSxWIDTHxHEADS."""

from __future__ import annotations

import re

from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape

VOCABULARY = 32000  # Llama's
SHAPES = {
    "llava-1.5-7b": DecoderShape(32, 4096, 11008, 32, 32, VOCABULARY),
    "llava-1.5-13b": DecoderShape(40, 5120, 13824, 40, 40, VOCABULARY),
    "cpu-medium": DecoderShape(12, 512, 1376, 8, 8, VOCABULARY, predictor_dim=64, predictor_ffn_dim=256),
}
ALIASES = {"7b": "llava-1.5-7b", "13b": "llava-1.5-13b"}


def shape_named(name: str) -> DecoderShape:
    """Return a known shape, or LxDxH: Llama's proportions (MLP 2.6875 D wide, predictors D/8) and vocabulary.

    Raises
    ------
    UserError
        An unknown name, a size that isn't positive, a width that the heads don't divide, fewer than 3 layers.
    """
    known = SHAPES.get(ALIASES.get(name.lower(), name.lower()))
    if known is not None:
        return known
    found = re.fullmatch(r"(-?\d+)x(-?\d+)x(-?\d+)", name.lower())
    if not found:
        raise UserError(f"--shape: {name!r} is neither one of {', '.join(SHAPES)} nor LAYERSxWIDTHxHEADS")
    layers, hidden, heads = map(int, found.groups())
    if layers < 3 or hidden < 1 or heads < 1:
        raise UserError(f"--shape: {name} needs at least 3 layers, and a positive width and number of heads")
    if hidden % (2 * heads) or hidden % 256:
        raise UserError(f"--shape: width {hidden} must be divisible by 256 and by twice the {heads} heads")
    width = hidden // 8
    return DecoderShape(layers, hidden, hidden * 43 // 16, heads, heads, VOCABULARY, width, 4 * width)
