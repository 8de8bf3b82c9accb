"""Checkpoints of the other families, stock ones and our own: transformers' loader reads them, this says what is wrong in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints.weights import PREDICTORS, is_added
from dynllava_plugin.model.configuration import PREFIX
from dynllava_plugin.model.families import FAMILIES
from dynllava_plugin.model.modeling import SparseVLM
from dynllava_plugin.sparsity.config import SparsityConfig

logger = logging.getLogger(__name__)

# What is asked for most and isn't here, with the reason.
REFUSED = {
    "gemma3": "image tokens attend both ways and half of the layers see a window",
    "idefics3": "its generation has a cache of its own",
    "smolvlm": "its generation has a cache of its own",
    "qwen2_vl": "the next model of its line, Qwen2.5-VL, is supported",
    "llava_next_video": "videos are not supported",
    "video_llava": "videos are not supported",
}


def family_of(values: dict[str, Any]) -> type[SparseVLM] | None:
    """Return the class that reads a config.json with these values; None where no family has its model_type."""
    return FAMILIES.get(str(values.get("model_type")).removeprefix(PREFIX))


def unknown_family(file: Path, kind: Any) -> UserError:
    """Return the error for a model_type that no one here reads."""
    if kind in REFUSED:
        return UserError(f"{file}: model_type {kind!r} is not supported: {REFUSED[kind]}")
    known = ", ".join(sorted(FAMILIES))
    return UserError(
        f"{file}: model_type {kind!r} is not a layout or a family this package reads (LLaVA-1.5 in its llava-hf, original, "
        f"published Dynamic-LLaVA and own layouts; {known})"
    )


def read_family_config(file: Path, values: dict[str, Any]) -> Any:
    """Return config.json's `values` as the family's config with `sparsity`, or raise `UserError`."""
    family = family_of(values)
    if family is None:
        raise unknown_family(file, values.get("model_type"))
    try:
        return family.config_class.from_dict(values)  # type: ignore[attr-defined]
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # transformers checks the types of fields, each its own way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file}: {reason}") from None


def read_family_model(
    directory: Path,
    config: Any,
    dtype: torch.dtype | None,
    attention: str | None,
    device: torch.device,
    quantization: QuantizationConfigMixin | None = None,
    before: SparsityConfig | None = None,
) -> tuple[Any, bool]:
    """Return the model of a folder on `device` and whether its predictors are fresh; `before` are the folder's own settings.

    Raises `UserError` for weights that are missing, superfluous, damaged or of another shape; an attention
    implementation that isn't there.
    """
    family = FAMILIES[config.model_type.removeprefix(PREFIX)]
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        model, info = family.from_pretrained(
            directory, config=config, dtype=dtype or "auto", output_loading_info=True, **options
        )
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{directory}: cannot be loaded ({reason})") from None
    missing = sorted(info["missing_keys"])
    fresh = [name for name in missing if PREDICTORS.match(name)]
    lacking = [name for name in missing if not PREDICTORS.match(name)]
    expected = sum(1 for name, _ in model.named_parameters() if PREDICTORS.match(name))
    added = before is not None and all(is_added(name, before) for name in fresh)
    if lacking or (fresh and len(fresh) < expected and not added):
        names = lacking or fresh
        raise UserError(
            f"{directory}: weights do not fit the model: {len(names)} missing ({', '.join(names[:3])})"
        )
    extra = sorted(info["unexpected_keys"])
    if extra:
        raise UserError(
            f"{directory}: weights do not fit the model: {len(extra)} not part of the model ({', '.join(extra[:3])})"
        )
    if quantization is None:
        torch.nn.Module.to(model, device)
    return model, bool(fresh) and not added


def read_family_processor(directory: Path) -> Any:
    """Return the folder's own processor, padding on the left, or raise `UserError`."""
    try:
        processor = AutoProcessor.from_pretrained(directory)
    except Exception as error:  # tokenizers, JSON and image processors each have their own
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{directory}: its processor's files are missing or damaged ({reason})") from None
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise UserError(f"{directory}: no tokenizer here (tokenizer.json)")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor
