"""A LoRA adapter with its predictors (peft's files), merged into the weights it was trained on."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints.sources import read_json
from dynllava_plugin.model.checkpoints.weights import PREDICTORS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What would change the merge, with the value that doesn't.
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


def is_adapter(directory: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (directory / CONFIG).is_file()


def base_of(directory: Path) -> str:
    """The checkpoint that an adapter was trained on: a folder or a hub id."""
    base = read_json(directory / CONFIG).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{directory / CONFIG}: names no base_model_name_or_path to merge into")
    return str(base)


def merge_adapter(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base's tensors with the adapter's predictors, and W + scale * B A for each adapted matrix.

    Parameters
    ----------
    directory : Path
        The adapter's folder.
    tensors : dict
        The base's weights under this package's names; not changed.

    Raises
    ------
    UserError
        A kind of adapter that isn't plain LoRA, damaged files, or another base than it was trained on.
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
    try:
        adapter = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory / WEIGHTS}: missing, truncated or not safetensors ({error})") from None
    merged = dict(tensors)
    for published, tensor in adapter.items():
        name = published.removeprefix(PREFIX)
        if PREDICTORS.match(name):
            merged[name] = tensor
            continue
        found = re.fullmatch(r"(.+)\.lora_A\.weight", name)
        if found is None:
            if not name.endswith(".lora_B.weight"):
                raise UserError(f"{directory / WEIGHTS}: {published} belongs to no LoRA and no predictor")
            continue
        target, second = f"{found[1]}.weight", adapter.get(f"{PREFIX}{found[1]}.lora_B.weight")
        if target not in tensors or second is None:
            raise UserError(f"{directory / WEIGHTS}: {published} has no counterpart in {base_of(directory)}")
        weight = tensors[target]
        change = scale * (second.float() @ tensor.float())
        if change.shape != weight.shape:
            raise UserError(
                f"{directory / WEIGHTS}: {published} changes a matrix of shape {list(change.shape)}, but that of "
                f"{base_of(directory)} is {list(weight.shape)}"
            )
        merged[target] = (weight.float() + change).to(weight.dtype)
    return merged
