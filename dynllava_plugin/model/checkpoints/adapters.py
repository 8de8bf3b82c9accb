"""A LoRA adapter (peft's files, this package's or the published code's), merged into the weights it was trained on."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import read_json
from dynllava_plugin.model.checkpoints.weights import read_weights
from dynllava_plugin.model.decoder import PREDICTORS

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Beside an adapter of the published and the original code: projector, predictors, all that trained in full.
TRAINED = "non_lora_trainables.bin"
# What would change the merge, with the value that doesn't.
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


def is_adapter(directory: Path) -> bool:
    """Return whether a folder holds an adapter rather than a model."""
    return (directory / CONFIG).is_file()


def base_of(directory: Path) -> str:
    """Return the checkpoint that an adapter was trained on: a folder or a hub id."""
    base = read_json(directory / CONFIG).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{directory / CONFIG}: names no base_model_name_or_path to merge into")
    return str(base)


def merge_adapter(
    directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the base's tensors with what was trained in full, and W + scale * B A for each adapted matrix.

    `directory` is the adapter's; the base's weights `tensors`, under this package's names, are not changed. Sums are taken in
    float32 and rounded once, to the model's `dtype`.

    Raises `UserError` for a kind of adapter that isn't plain LoRA, damaged files, or another base than it was trained
    on.
    """
    config = read_json(directory / CONFIG)
    for name, plain in PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise UserError(
                f"{directory / CONFIG}: {name} {config[name]!r} is not supported, only plain LoRA is"
            )
    missing = [name for name in ("r", "lora_alpha") if not isinstance(config.get(name), (int, float))]
    if missing or not config["r"]:
        raise UserError(
            f"{directory / CONFIG}: no {' and no '.join(missing) or 'rank'}, so it isn't a LoRA's"
        )
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    file = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if file is None:
        raise UserError(f"{directory}: no {' nor '.join(WEIGHTS)} here")
    merged = {**tensors, **(read_weights(directory / TRAINED) if (directory / TRAINED).is_file() else {})}
    adapter = read_weights(file)
    for name, tensor in adapter.items():
        if PREDICTORS.match(name) and ".lora_" not in name:
            merged[name] = tensor
            continue
        found = re.fullmatch(r"(.+)\.lora_A\.weight", name)
        if found is None:
            if not name.endswith(".lora_B.weight"):
                raise UserError(f"{file}: {name} belongs to no LoRA and no predictor")
            continue
        target, second = f"{found[1]}.weight", adapter.get(f"{found[1]}.lora_B.weight")
        if target not in merged or second is None:
            raise UserError(f"{file}: {name} has no counterpart in {base_of(directory)}")
        weight = merged[target]
        change = scale * (second.float() @ tensor.float())
        if change.shape != weight.shape:
            raise UserError(
                f"{file}: {name} changes a matrix of shape {list(change.shape)}, but that of "
                f"{base_of(directory)} is {list(weight.shape)}"
            )
        merged[target] = change.add_(weight).to(dtype)
    return merged
