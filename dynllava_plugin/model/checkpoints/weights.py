"""A checkpoint's weight files as one dictionary of tensors under this package's parameter names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.model.decoder import PREDICTORS
from dynllava_plugin.sparsity.config import SparsityConfig

# What this package and the published code call the same: # is a number.
_IMAGE_PREDICTOR = {
    "norm": "down_mlp.0",
    "in_proj": "down_mlp.1",
    "head": "output_mlp",
    "blocks.#.attention_norm": "transformer.#.norm1",
    "blocks.#.qkv_proj": "transformer.#.attn.qkv",
    "blocks.#.out_proj": "transformer.#.attn.proj",
    "blocks.#.ffn_norm": "transformer.#.norm2",
    "blocks.#.fc1": "transformer.#.mlp.fc1",
    "blocks.#.fc2": "transformer.#.mlp.fc2",
}
_TEXT_PREDICTOR = {"norm": "0", "in_proj": "1", "head.0": "3", "head.2": "5", "head.4": "7"}
BOTH_WAYS = (  # the first that fits counts
    *((f"model.multi_modal_projector.linear_{i + 1}.", f"model.mm_projector.{2 * i}.") for i in range(9)),
    ("model.multi_modal_projector.", "model.mm_projector."),
    *(
        (f"model.language_model.{ours}.{mine}.", f"model.{theirs}.{name}.")
        for ours, theirs, inside in (
            ("image_predictor", "image_score_predictor", _IMAGE_PREDICTOR),
            ("text_predictor", "output_text_score_predictor.output_mlp", _TEXT_PREDICTOR),
            ("prompt_predictor", "instruct_score_predictor.output_mlp", _TEXT_PREDICTOR),
        )
        for mine, name in inside.items()
    ),
)


def as_rename(name: str, other: str) -> tuple[str, str]:
    """Return pattern and replacement that make a name which begins as `name` begin as `other`; # is a number."""
    return "^" + re.escape(name).replace(r"\#", r"(\d+)"), other.replace("#", r"\1")


# Names of any layout -> ours, applied top to bottom; the layouts do not collide, so that one table serves all.
RENAMES = (
    # adapters name the weights of a wrapped model
    (r"^base_model\.model\.", ""),
    (r"^model\.model\.", "model."),
    # stock families as published on the hub
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", "model.language_model."),
    (r"^(vision_tower|visual|multi_modal_projector|image_newline)\b", r"model.\1"),
    # original LLaVA-1.5 and published Dynamic-LLaVA
    *(as_rename(theirs, ours) for ours, theirs in BOTH_WAYS),
    (r"^model\.vision_tower\.vision_tower\.", "model.vision_tower."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
    # `save_pretrained` of a model that was built, not loaded, goes back to LLaVA's older names
    (r"^model\.language_model\.model\.", "model.language_model."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
# Buffers that are computed; of a full CLIP repository all but the vision half.
IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.position_ids$|^(text_model|text_projection|visual_projection|logit_scale)\b"
)
PROMPT_PREDICTOR = "model.language_model.prompt_predictor."
VISION = "model.vision_tower."
_DECODER_LAYER = re.compile(r"^(?!.*(?:vision|visual)).*\blayers\.(\d+)\.")

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def is_added(name: str, before: SparsityConfig) -> bool:
    """Return whether a parameter belongs to what a checkpoint with the settings `before` hasn't: a gate, being told a budget."""
    found = PREDICTORS.match(name)
    if found is None:
        return False
    gates = {f"_{layer}" for layer, _ in before.later_gates}
    return (
        (found[2] is not None and found[2] not in gates)
        or (before.vision_keep_range is None and ".rate_proj." in name)
        or (not before.prompt_predictor and name.startswith(PROMPT_PREDICTOR))
    )


def our_name(published: str) -> str:
    """Return this package's name of a published parameter."""
    for pattern, replacement in RENAMES:
        published = re.sub(pattern, replacement, published)
    return published


def read_weights(*files: Path, rename: Callable[[str], str] = our_name) -> dict[str, torch.Tensor]:
    """Return every tensor of weight files, renamed to our names, memory-mapped: reading costs nothing until one is used.

    Raises `UserError` for a file that is truncated, or a ``.bin`` of more than tensors.
    """
    return {
        rename(name): tensor
        for path in files
        for name, tensor in read_file(path).items()
        if not IGNORED.search(name)
    }


def check_depth(directory: Path, names: Iterable[str], layers: int) -> None:
    """Raise `UserError` where config.json means more decoder layers than the weights called `names` hold.

    Such a model would be built, for minutes or until memory ends, before its weights are found missing.
    """
    found = {match.group(1) for match in map(_DECODER_LAYER.search, names) if match}
    if layers > len(found):
        raise UserError(
            f"{directory / 'config.json'}: num_hidden_layers is {layers}, its weights hold {len(found)} layers"
        )


def read_ahead(files: Iterable[Path]) -> None:
    """Ask the system to read weight files now, while the model around them is being built."""
    for path in files if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights: safetensors where there are any, else PyTorch files.

    Raises `UserError` for no such file, or one missing that an index names.
    """
    for single, index in (SAFETENSORS, PICKLES):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _indexed_files(directory / index)
    raise UserError(f"{directory}: no weights here (model.safetensors, its index, or pytorch_model.bin)")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not a weight index (JSON with a weight_map)") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: names a file outside its folder ({name})")
        if not (index.parent / name).is_file():
            raise UserError(
                f"{index.parent / name}: missing, though {index.name} lists it; download it again"
            )
    return [index.parent / name for name in names]


def read_file(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors of a safetensors or PyTorch file under its own names; `UserError` where it is neither, or damaged."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or not a safetensors file ({one_line(error)})") from None
    return _read_pickle(path)


def _read_pickle(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors of a PyTorch file, without running anything that its pickle asks for."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than PyTorch 1.6 cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what isn't a pickle stops the unpickler on any of its lines
        raise UserError(f"{path}: not a plain file of tensors, refused ({one_line(error)})") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise UserError(f"{path}: not a plain file of tensors, refused")
    return tensors
