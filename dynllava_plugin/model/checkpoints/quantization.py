"""The LLM's layers in eight or four bits, as transformers and bitsandbytes make them; the predictors stay as they are."""

from __future__ import annotations

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from dynllava_plugin.errors import UserError

QUANTIZATIONS = ("8bit", "4bit")
# Predictors decide by small differences; the vision side is small, and the output matrix is what transformers leaves out too.
AS_THEY_ARE = [
    "lm_head",
    r"model\.language_model\.(image|text|prompt)_predictor(_\d+)?",
    *(f"model.{name}" for name in ("vision_tower", "visual", "multi_modal_projector")),
]


def find_quantization(name: str | None, dtype: torch.dtype | None) -> BitsAndBytesConfig | None:
    """Return the configuration that "8bit" or "4bit" stands for; None for None.

    `dtype` is what four-bit weights are multiplied in.

    Raises `UserError` for another name, and where bitsandbytes isn't installed.
    """
    if name is None:
        return None
    if name not in QUANTIZATIONS:
        raise UserError(f"quantization: {name!r} is not one of {', '.join(QUANTIZATIONS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization: {name!r} needs bitsandbytes; install it with pip install 'dynllava-plugin[qlora]'"
        )
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=AS_THEY_ARE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype or torch.float32,
        llm_int8_skip_modules=AS_THEY_ARE,
    )
