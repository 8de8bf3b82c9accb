"""The four checkpoint layouts: telling them apart, and their config.json as a `DynamicLlavaConfig`.

=========  ========================================  ====================================================
layout     `model_type` in config.json               examples
=========  ========================================  ====================================================
own        dynamic_llava                             `save_pretrained` of this package
llava-hf   llava, with a `text_config`               llava-hf/llava-1.5-7b-hf, the bundled tiny model
original   llava_llama, llava                        liuhaotian/llava-v1.5-7b
published  the same or dynamic_llava_llama, with a   Osilly/Dynamic-LLaVA-7B
           `sparse_config`
=========  ========================================  ====================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.files import read_json
from dynllava_plugin.model.checkpoints.sources import find_checkpoint
from dynllava_plugin.model.configuration import PREFIX, text_config_class
from dynllava_plugin.model.families import FAMILIES
from dynllava_plugin.model.families.llava import DynamicLlavaConfig
from dynllava_plugin.model.families.projectors import check_projector, image_tokens
from dynllava_plugin.model.families.text_models import DynamicLlamaConfig
from dynllava_plugin.sparsity.config import SparsityConfig

OWN, LLAVA_HF, ORIGINAL, PUBLISHED = "own", "llava-hf", "original", "published"
FAMILY = "family"  # another family's, stock or our own
# Families that are asked for most and aren't here, with the reason.
REFUSED = {
    "gemma3": "image tokens attend both ways and half of the layers see a window",
    "idefics3": "its generation has a cache of its own",
    "smolvlm": "its generation has a cache of its own",
    "video_llava": "its images and videos have a vision tower each",
}
# The original code's `mm_vision_select_feature` -> `vision_feature_select_strategy`.
STRATEGIES = {"patch": "default", "cls_patch": "full"}

# Our setting -> the published `sparse_config`'s key. Everything else in there (maskclip*,
# similar_postive_num, ...) belongs to experiments that the method does not use.
PUBLISHED_SETTINGS = {
    "predictor_dim": "d_model",
    "predictor_heads": "nhead",
    "predictor_ffn_dim": "dim_feedforward",
    "predictor_layers": "num_layers",
    "sparse_layer": "sparse_layer",
    "vision_keep_rate": "vision_keep_rate",
    "text_keep_rate": "output_text_keep_rate",
    "min_text_length": "output_text_len_for_training",
    "keep_loss_weight": "mask_loss_weight",
    "prompt_predictor": "use_instruct_predictor",
    "prompt_keep_rate": "instruct_keep_rate",
    "min_prompt_length": "instruct_len_for_training",
}
LLAMA_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    " head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings"
    " rope_theta rope_scaling attention_bias attention_dropout mlp_bias pretraining_tp"
    " bos_token_id eos_token_id"
).split()
# The vision tower of every published LLaVA-1.5; known by name, so that its config need not be fetched.
CLIP_L_336 = "openai/clip-vit-large-patch14-336"
CLIP_L_336_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def layout_of(directory: Path, values: dict[str, Any]) -> str:
    """Return which layout a checkpoint's config.json is; `UserError` where it is none of them."""
    kind = values.get("model_type")
    if kind == "dynamic_llava":
        return OWN
    if kind == "llava" and "text_config" in values:
        return LLAVA_HF
    if kind in ("llava", "llava_llama", "dynamic_llava_llama") and "mm_vision_tower" in values:
        return PUBLISHED if "sparse_config" in values else ORIGINAL
    if kind != "llava" and str(kind).removeprefix(PREFIX) in FAMILIES:
        return FAMILY
    file = directory / "config.json"
    if str(kind) in REFUSED:
        raise UserError(f"{file}: model_type {kind!r} is not supported: {REFUSED[str(kind)]}")
    raise UserError(
        f"{file}: model_type {kind!r} is not a layout or a family this package reads (LLaVA-1.5 in its llava-hf, original, "
        f"published Dynamic-LLaVA and own layouts; {', '.join(sorted(FAMILIES))})"
    )


def read_config(directory: Path, values: dict[str, Any]) -> Any:
    """Return config.json of any layout as its family's config with `sparsity`, its vocabulary as published."""
    file, layout = directory / "config.json", layout_of(directory, values)
    try:
        if layout in (ORIGINAL, PUBLISHED):
            config: Any = _from_original(directory, values)
        else:
            if layout == LLAVA_HF:
                text = {"model_type": "llama", **values["text_config"]}
                text_config_class(text["model_type"])  # transformers would list the hundreds that it knows
                values = {"image_aspect_ratio": "square", **values, "text_config": text}
            family: Any = FAMILIES[values["model_type"].removeprefix(PREFIX)]
            config = family.config_class.from_dict(values)
        if layout != FAMILY:
            check_projector(config)
        if layout in (ORIGINAL, PUBLISHED):
            config.image_seq_length = image_tokens(config)
        return config
    except Exception as error:  # transformers checks the types of fields, each its own way
        reason = str(error) if isinstance(error, UserError) else one_line(error, 200)
        raise UserError(reason if reason.startswith(str(file)) else f"{file}: {reason}") from None


def _from_original(directory: Path, values: dict[str, Any]) -> DynamicLlavaConfig:
    _refuse_what_is_not_done(values)
    missing = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers") if key not in values]
    if missing:
        raise UserError(f"{missing[0]} is missing")
    text = {key: values[key] for key in LLAMA_FIELDS if values.get(key) is not None}
    if "sparse_config" in values:
        text["sparsity"] = _published_sparsity(values["sparse_config"])
    options: dict[str, Any] = {
        "bos_token_id": values.get("bos_token_id", 1),
        "eos_token_id": values.get("eos_token_id", 2),
        "dtype": values.get("torch_dtype") or values.get("dtype"),
    }
    return DynamicLlavaConfig(
        text_config=DynamicLlamaConfig(**text),
        vision_config=vision_config(directory, values),
        vision_feature_layer=values.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=STRATEGIES[values.get("mm_vision_select_feature") or "patch"],
        image_aspect_ratio=values.get("image_aspect_ratio") or "square",
        projector_type=values.get("mm_projector_type", "linear"),
        tokenpacker_scale=values.get("scale_factor"),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        **options,
    )


def _refuse_what_is_not_done(values: dict[str, Any]) -> None:
    """Raise `UserError` for a setting of the original code that would make another model than LLaVA-1.5."""
    scales = values.get("s2_scales")
    if values.get("s2", bool(scales)):
        raise UserError(f"s2 (a tower run at several scales, {scales}) is not supported")
    done = {
        "mm_patch_merge_type": ("flat",),
        "mm_vision_select_feature": tuple(STRATEGIES),
        "image_aspect_ratio": ("square", "pad"),
        "mm_use_im_start_end": (False,),
    }
    for key, choices in done.items():
        found = values.get(key)
        if found is not None and found not in choices:
            raise UserError(f"{key} {found!r} is not supported, only {' and '.join(map(repr, choices))}")


def _published_sparsity(published: dict[str, Any]) -> SparsityConfig:
    settings = {ours: published[theirs] for ours, theirs in PUBLISHED_SETTINGS.items() if theirs in published}
    if not published.get("use_vision_predictor", True):
        raise UserError("sparse_config has no vision predictor, which this package needs")
    settings["prompt_predictor"] = bool(published.get("use_instruct_predictor", False))
    if not settings["prompt_predictor"]:
        settings["prompt_keep_rate"] = 1.0
    text = bool(
        published.get("use_text_predictor", True) and published.get("use_output_text_predictor", True)
    )
    try:
        return SparsityConfig(**settings, text_predictor=text, mode="image_text" if text else "image")
    except UserError as error:
        raise UserError(f"sparse_config: {error}") from None


def vision_folder(directory: Path, values: dict[str, Any], weights: bool) -> Path:
    """Return the folder of the vision tower that an original-layout checkpoint names.

    A name is looked for relative to the checkpoint first, then on the hub (`weights`: including its weights).
    """
    name = str(values.get("mm_vision_tower"))
    if is_clip_l_336(directory, values):
        name = CLIP_L_336
    elif (directory / name / "config.json").is_file():
        return directory / name
    try:
        return find_checkpoint(name, weights)
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: mm_vision_tower: {error}") from None


def is_clip_l_336(directory: Path, values: dict[str, Any]) -> bool:
    """Return whether `mm_vision_tower` is CLIP ViT-L/14-336: by its hub id, or as a folder of that name on another machine."""
    name = str(values.get("mm_vision_tower"))
    here = (directory / name).is_dir() or Path(name).expanduser().is_dir()
    return Path(name).name == Path(CLIP_L_336).name and not here


def vision_config(directory: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return the vision tower's config as a dict of `CLIPVisionConfig` fields."""
    if is_clip_l_336(directory, values):
        return dict(CLIP_L_336_CONFIG)
    folder = vision_folder(directory, values, weights=False)
    config = read_json(folder / "config.json")
    if "vision_config" in config:
        config = {"model_type": "clip_vision_model", **config["vision_config"]}
    if config.get("model_type") != "clip_vision_model":
        raise UserError(
            f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is not a CLIP vision tower"
        )
    keep = (*CLIP_L_336_CONFIG, "hidden_act", "layer_norm_eps", "num_channels", "attention_dropout")
    return {key: config[key] for key in keep if key in config}
