"""LoRA for the LLM (in a quantised one: QLoRA) beside predictors that train in full, through peft."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dynllava_plugin.model.checkpoints.adapters import base_of, is_adapter
from train.arguments import AdapterArguments

PREDICTORS = ("image_predictor", "text_predictor", "prompt_predictor")
ADAPTER_PARTS = ("lora_", ".modules_to_save")  # of a state dict's names: what is trained
DECODER = "model.language_model.layers"


def add_adapter(model: Any, args: AdapterArguments) -> Any:
    """Return the model, quantised or not, as a `peft.PeftModel` with LoRA in its decoder layers.

    Predictors train in float32, everything else is frozen; its `save_pretrained` writes adapter and predictors.
    """
    from peft import LoraConfig, get_peft_model

    # The vision tower has layers of the same names; only the LLM's get an adapter.
    targets = "|".join(args.lora_targets)
    trained = trained_predictors(model)
    config = LoraConfig(
        task_type=None,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha if args.lora_alpha is not None else 2 * args.lora_rank,  # type: ignore[arg-type]
        lora_dropout=args.lora_dropout,
        target_modules=rf"{re.escape(DECODER)}\..*\.({targets})",
        modules_to_save=trained,
    )
    with warnings.catch_warnings():  # peft asks for it by its older name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
    for name in trained:  # copies in the LLM's dtype, but these train
        getattr(model.model.language_model, name).modules_to_save.float()
    return adapted


def trained_predictors(model: Any) -> list[str]:
    """Return the predictors that a model's mode uses; one that never runs gets no gradient, and learns nothing."""
    sparsity = model.config.sparsity
    used: tuple[str, ...] = PREDICTORS[:1] if sparsity.mode == "image" else PREDICTORS[:2]
    used += PREDICTORS[2:] if sparsity.drops_prompt else ()
    used = (*used, *(f"image_predictor_{layer}" for layer, _ in sparsity.later_gates))
    return [name for name in used if getattr(model.model.language_model, name) is not None]


def is_adapted(model: Any) -> bool:
    """Whether `add_adapter` made this model."""
    return hasattr(model, "peft_config")


def save_adapter(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """peft's files: the adapter's matrices and the predictors, and what they belong to."""
    from peft import get_peft_model_state_dict

    named = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def bases(model_name: str) -> list[Path]:
    """Return the folders that a model is loaded from: its own, and where that holds an adapter the one under it."""
    folder = Path(model_name)
    if not folder.is_dir():
        return []
    return [folder, *(bases(base_of(folder)) if is_adapter(folder) else [])]
