"""A model around tensors that are read already: nothing is drawn that a checkpoint holds, nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from dynllava_plugin.model.configuration import PREFIX
from dynllava_plugin.model.families import FAMILIES
from dynllava_plugin.model.families.llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration


def empty_model(
    config: DynamicLlavaConfig, dtype: torch.dtype, attention: str | None
) -> DynamicLlavaForConditionalGeneration:
    """The model without memory for its weights (on the meta device).

    Raises `ImportError` or `ValueError` for an attention implementation that isn't there.
    """
    family: Any = FAMILIES[config.model_type.removeprefix(PREFIX)]
    with torch.device("meta"):
        if _spread_over_processes():
            return family(config)
        return family._from_config(config, dtype=dtype, **_options(attention))


def fill(
    model: DynamicLlavaForConditionalGeneration,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    attention: str | None,
    device: torch.device | None = None,
    quantization: Any = None,
) -> DynamicLlavaForConditionalGeneration:
    """`empty_model`'s answer with `tensors` as its parameters; missing ones are drawn as transformers draws them.

    With a `quantization` config the parameters are made of fewer bits on `device`, by transformers' own loader.
    """
    options = _options(attention)
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    model = type(model).from_pretrained(None, config=model.config, state_dict=tensors, dtype=dtype, **options)
    model._weight_conversions = []  # `save_pretrained` keeps these names
    return model


def _spread_over_processes() -> bool:
    """Whether DeepSpeed ZeRO-3 or FSDP share the weights out, which transformers' own loader knows how to do."""
    return bool(is_deepspeed_zero3_enabled() or is_fsdp_enabled())


def _options(attention: str | None) -> dict[str, Any]:
    return {} if attention is None else {"attn_implementation": attention}
