"""`dynllava convert`: any layout to this package's own, or to that of the published Dynamic-LLaVA code."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import LlamaConfig

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import check_folder
from dynllava_plugin.model.checkpoints.layouts import CLIP_L_336, CLIP_L_336_CONFIG, PUBLISHED_SETTINGS
from dynllava_plugin.model.checkpoints.loading import load_model, load_without_processor
from dynllava_plugin.model.checkpoints.processors import has_tokenizer, tokenizer_folder
from dynllava_plugin.model.checkpoints.sources import find_checkpoint
from dynllava_plugin.model.checkpoints.weights import BOTH_WAYS, as_rename, our_name
from dynllava_plugin.model.families.llava import DynamicLlavaConfig

DYNAMIC, PUBLISHED = "dynamic", "published"
CLIP_FOLDER = "clip"
SHARD = 5 * 10**9  # bytes of a file
# This package's names -> the published ones; the first that fits counts.
PUBLISHED_NAMES = (
    *(as_rename(ours, theirs) for ours, theirs in BOTH_WAYS),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.language_model\.", "model."),
)
TEXT_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias"),
    *("attention_dropout", "bos_token_id", "eos_token_id"),
)


def convert(
    source: str | Path, target: str | Path, to: str, tokenizer: str | Path | None = None
) -> list[str]:
    """Write a checkpoint of any layout in another one; return what the reader of the result has to know, a line each.

    `source` is what `load_model` takes; an adapter is merged. `target` is a folder that does not exist yet, or is empty, and
    appears when all of it is written. `to` is "dynamic", this package's own layout, or "published", that of the published code,
    which needs the LLM's ``tokenizer.model`` from the folder `tokenizer` (default: the source).

    Raises `UserError` where the source can't be read, the target is in use, or the model has no place in that layout.
    """
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder; convert into a new one")
    if tokenizer is not None and not has_tokenizer(Path(tokenizer)):
        raise UserError(f"--tokenizer {tokenizer}: no tokenizer there (tokenizer.model)")
    check_folder("TARGET", folder)
    directory = find_checkpoint(source)
    texts = tokenizer_folder(directory)
    complete = has_tokenizer(texts)
    if complete:
        model, processor = load_model(source, device="cpu")
    else:
        model, processor = load_without_processor(source, device="cpu"), None
    _check_finite(source, model)
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        if to == DYNAMIC:
            _write_dynamic(model, processor, temporary)
            notes = []
        else:
            notes = _write_published(model, processor, temporary, Path(tokenizer or texts))
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return notes if complete else [f"{source} has no tokenizer, so {folder} has none either", *notes]


def _check_finite(source: str | Path, model: torch.nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{source}: {name} holds numbers that are not finite; the checkpoint is damaged")


def published_name(ours: str) -> str:
    """Return the published code's name of one of this package's parameters."""
    for pattern, replacement in PUBLISHED_NAMES:
        name, found = re.subn(pattern, replacement, ours)
        if found:
            break
    assert our_name(name) == ours, (ours, name)
    return name


def _write_dynamic(model: Any, processor: Any, folder: Path) -> None:
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _write_published(model: Any, processor: Any, folder: Path, tokenizer: Path) -> list[str]:
    config = model.config
    _check_place(config)
    rows = published_rows(config, processor and processor.tokenizer)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = tensor[:rows].clone()
        tensors[published_name(name)] = tensor.contiguous()
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD)
    # CLIP ViT-L/14-336 goes by its name, any other tower into a folder of the checkpoint.
    by_name = all(getattr(config.vision_config, name) == x for name, x in CLIP_L_336_CONFIG.items())
    tower = CLIP_L_336 if by_name else CLIP_FOLDER
    if not by_name:
        _write_vision_tower(model, processor, folder / CLIP_FOLDER)
    values = published_config(config, rows, tower, str(model.dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if processor is None:
        return []
    if (tokenizer / "tokenizer.model").is_file():
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, folder / name)
        return []
    processor.tokenizer.save_pretrained(folder)
    return [
        f"{tokenizer} has no tokenizer.model: this package reads the tokenizer.json in its stead, the published "
        "code does not; name a folder that has it with --tokenizer"
    ]


def _check_place(config: Any) -> None:
    """Raise `UserError` for a model that the published layout has no place for: it is LLaVA-1.5's, with a CLIP and a Llama."""
    text, vision, sparsity = config.text_config, config.vision_config, config.sparsity
    own_width = getattr(text, "head_dim", None) not in (None, text.hidden_size // text.num_attention_heads)
    for what, found in (
        (f"a {config.model_type.removeprefix('dynamic_')}", not isinstance(config, DynamicLlavaConfig)),
        (f"an LLM that is a {text.model_type.removeprefix('dynamic_')}", not isinstance(text, LlamaConfig)),
        (f"a vision tower that is a {vision.model_type}", vision.model_type != "clip_vision_model"),
        (
            "an LLM with a head_dim of its own or biases in its MLP",
            own_width or getattr(text, "mlp_bias", False),
        ),
        ("a model of several gates", sparsity.later_gates),
        ("a model that is told its budget", sparsity.vision_keep_range),
    ):
        if found:
            raise UserError(f"--to published: {what} has no place in that layout; choose --to dynamic")


def published_rows(config: DynamicLlavaConfig, tokenizer: Any) -> int:
    """Return how many rows the vocabulary has in the published layout, which has no image and no padding token of its own."""
    text: Any = config.text_config
    if config.placeholder_tokens:
        return text.vocab_size - config.placeholder_tokens
    # llava-hf adds <image> and <pad> behind the LLM's tokens, and rows that nothing refers to behind those.
    added = sorted((config.image_token_index, text.pad_token_id or 0))
    if tokenizer is not None and added == [len(tokenizer) - 2, len(tokenizer) - 1]:
        return added[0]
    return text.vocab_size


def published_config(config: DynamicLlavaConfig, rows: int, tower: str, dtype: str) -> dict[str, Any]:
    """config.json of the published layout; `rows` is its vocabulary, `tower` its `mm_vision_tower`."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    full = config.vision_feature_select_strategy == "full"
    values = {name: getattr(text, name) for name in TEXT_FIELDS if getattr(text, name, None) is not None}
    rope = dict(getattr(text, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") not in ("default", "linear", "dynamic"):
        raise UserError(f"rope_type {rope['rope_type']!r} has no place in the published layout")
    scaling = None
    if rope.get("rope_type", "default") != "default":
        scaling = {"type": rope["rope_type"], "factor": rope["factor"]}
    sparsity, settings = config.sparsity, {}
    for ours, theirs in PUBLISHED_SETTINGS.items():
        if sparsity.prompt_predictor or "prompt" not in ours or ours == "prompt_predictor":
            settings[theirs] = getattr(sparsity, ours)
    return {
        **values,
        "architectures": ["DynamicLlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": rows,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaling,
        "pretraining_tp": 1,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": dtype,
        "use_cache": True,
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": config.projector_type,
        **({"scale_factor": config.tokenpacker_scale} if config.tokenpacker_scale else {}),
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if full else "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": tower,
        "use_mm_proj": True,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "sparse_config": {
            **settings,
            "use_vision_predictor": True,
            "use_text_predictor": sparsity.text_predictor,
            "use_output_text_predictor": sparsity.text_predictor,
        },
    }


def _write_vision_tower(model: Any, processor: Any, folder: Path) -> None:
    folder.mkdir()
    values = {**model.config.vision_config.to_dict(), "architectures": ["CLIPVisionModel"]}
    (folder / "config.json").write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    tensors = model.model.vision_tower.state_dict()
    tensors = {f"vision_model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD)
    if processor is not None:
        processor.image_processor.save_pretrained(folder)
