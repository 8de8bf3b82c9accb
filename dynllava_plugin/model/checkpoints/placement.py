"""Where a model runs and in which numbers, from what a user gave."""

from __future__ import annotations

from typing import Any

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.families.llava import DynamicLlavaConfig

# Spelled out: PyTorch has other names of the same types ("float"), and float64 is for checking figures.
_NAMES = ("float32", "bfloat16", "float16", "float64")


def find_device(device: str | torch.device | None) -> torch.device:
    """The device meant, the GPU where none is named and there is one; `UserError` where it isn't here."""
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


def find_dtype(
    dtype: str | torch.dtype | None, config: DynamicLlavaConfig, of_weights: torch.dtype
) -> torch.dtype:
    """The number type meant; without one the config's, else `of_weights`. `UserError` where it is none."""
    wanted: Any = dtype
    text: Any = config.text_config
    if wanted in (None, "auto"):
        wanted = config.dtype or text.dtype or of_weights
    if isinstance(wanted, str) and wanted.removeprefix("torch.") in _NAMES:
        wanted = getattr(torch, wanted.removeprefix("torch."))
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise UserError(f"dtype: {dtype!r} is not one of float32, bfloat16, float16")
    return wanted
