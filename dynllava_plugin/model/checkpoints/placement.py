"""Where a model runs and in which numbers, from what a user gave; quantised are the LLM's layers alone."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from dynllava_plugin.errors import UserError

# Spelled out: PyTorch has other names of the same types ("float"), and float64 is for checking figures.
_NAMES = ("float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("8bit", "4bit")
# Predictors decide by small differences; the vision side is small, and the output matrix is what transformers leaves out too.
AS_THEY_ARE = [
    "lm_head",
    r"model\.language_model\.(image|text|prompt)_predictor(_\d+)?",
    *(f"model.{name}" for name in ("vision_tower", "visual", "multi_modal_projector")),
]


def find_device(device: str | torch.device | None) -> torch.device:
    """Return the device meant, the GPU where none is named and there is one; `UserError` where it isn't here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: {device!r} is not a device (cpu, cuda, cuda:0, ...)") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device!r} asked for, but PyTorch sees no GPU here")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {device!r} asked for, but there are {torch.cuda.device_count()} GPUs")
    return found


def find_dtype(dtype: str | torch.dtype | None, config: Any, of_weights: torch.dtype) -> torch.dtype:
    """Return the number type meant; without one the config's, else `of_weights`. `UserError` where it is none."""
    wanted: Any = dtype
    if wanted in (None, "auto"):
        wanted = config.dtype or config.text_config.dtype or of_weights
    if isinstance(wanted, str) and wanted.removeprefix("torch.") in _NAMES:
        wanted = getattr(torch, wanted.removeprefix("torch."))
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise UserError(f"dtype: {dtype!r} is not one of float32, bfloat16, float16")
    return wanted


def find_quantization(name: str | None, dtype: torch.dtype | None) -> BitsAndBytesConfig | None:
    """Return the configuration that "8bit" or "4bit" stands for, None for None; `UserError` for another name.

    `dtype` is what four-bit weights are multiplied in. bitsandbytes makes them, and has to be installed.
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
