"""The processor of a checkpoint, from whatever files its layout has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.clip import CLIPImageProcessor

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints.layouts import CLIP_L_336, LLAVA_HF, OWN, vision_folder
from dynllava_plugin.model.checkpoints.sources import read_json
from dynllava_plugin.model.checkpoints.tokenizers import original_spacing, read_original_tokenizer
from dynllava_plugin.model.configuration import DynamicLlavaConfig
from dynllava_plugin.model.processing import DynamicLlavaProcessor
from dynllava_plugin.model.prompts import IMAGE_TOKEN

PAD_TOKEN = "<pad>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def read_tokenizer(directory: Path, layout: str) -> Any:
    """A checkpoint's tokenizer, with an image and a padding token, or None where it has no tokenizer files."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        if layout in (OWN, LLAVA_HF):
            tokenizer = AutoTokenizer.from_pretrained(directory)
        else:
            tokenizer = read_original_tokenizer(directory)
    except Exception as error:  # sentencepiece, tokenizers and JSON each have their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory}: its tokenizer cannot be read ({reason})") from None
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.unk_token:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    tokenizer.padding_side = "left"
    return tokenizer


def read_processor(
    directory: Path, layout: str, values: dict[str, Any], config: DynamicLlavaConfig, tokenizer: Any
) -> DynamicLlavaProcessor:
    """The processor of any layout; `values` is the checkpoint's config.json, `config` what became of it."""
    if tokenizer is None:
        raise UserError(f"{directory}: no tokenizer here ({' or '.join(TOKENIZER_FILES)})")
    if layout == OWN:
        processor = AutoProcessor.from_pretrained(directory)
        if not isinstance(processor, DynamicLlavaProcessor):
            raise UserError(f"{directory / 'processor_config.json'}: missing, or not written by this package")
        return processor
    settings = {
        "image_aspect_ratio": config.image_aspect_ratio,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # CLIP's class token, which the "default" strategy takes off again
    }
    if layout == LLAVA_HF:
        found = AutoProcessor.from_pretrained(directory)
        spacing = _llava_hf_spacing(directory)
        return DynamicLlavaProcessor(
            found.image_processor, tokenizer, chat_template=found.chat_template, spacing=spacing, **settings
        )
    return DynamicLlavaProcessor(_image_processor(directory, values), tokenizer, spacing=original_spacing(directory), **settings)


def _llava_hf_spacing(directory: Path) -> str:
    """The original rule where a llava-hf tokenizer came from the original sentencepiece model, else the tokenizer's.

    Such a tokenizer.json puts a "▁" before every stretch of text, the one after an image included: the ids that the
    weights were trained on. transformers 5 rebuilds Llama tokenizers without looking at that rule.
    """
    file = directory / "tokenizer.json"
    if file.is_file():
        normalizer = read_json(file).get("normalizer") or {}
        rules = normalizer.get("normalizers", [normalizer])
        if not any(rule.get("type") == "Prepend" and rule.get("prepend") == "▁" for rule in rules):
            return "tokenizer"
    return original_spacing(directory)


def _image_processor(directory: Path, values: dict[str, Any]) -> Any:
    """The checkpoint's own preprocessor, else its vision tower's, else CLIP ViT-L/14-336's."""
    if (directory / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(directory)
    if values.get("mm_vision_tower") == CLIP_L_336 and not (directory / CLIP_L_336).is_dir():
        return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    folder = vision_folder(directory, values, weights=False)
    if not (folder / "preprocessor_config.json").is_file():
        raise UserError(f"{folder}: no preprocessor_config.json for the vision tower of {directory}")
    return AutoImageProcessor.from_pretrained(folder)
