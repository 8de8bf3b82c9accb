"""The processor of a checkpoint, from whatever files its layout has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoImageProcessor, AutoProcessor, AutoTokenizer, LlamaTokenizer
from transformers.models.clip import CLIPImageProcessor

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.files import read_json
from dynllava_plugin.model.checkpoints.adapters import base_of, is_adapter
from dynllava_plugin.model.checkpoints.layouts import FAMILY, LLAVA_HF, OWN, is_clip_l_336, vision_folder
from dynllava_plugin.model.checkpoints.sources import find_checkpoint
from dynllava_plugin.model.checkpoints.tokenizers import original_spacing, read_original_tokenizer
from dynllava_plugin.model.families.projectors import packed_side
from dynllava_plugin.model.processing import DynamicLlavaProcessor
from dynllava_plugin.model.prompts import IMAGE_TOKEN

PAD_TOKEN = "<pad>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def read_tokenizer(directory: Path, layout: str) -> Any:
    """Return a checkpoint's tokenizer with an image and a padding token; None where it has none, or comes with the processor."""
    if layout in (OWN, FAMILY) or not has_tokenizer(directory := tokenizer_folder(directory)):
        return None
    try:
        if layout == LLAVA_HF and _is_sentencepiece(directory):
            tokenizer = LlamaTokenizer.from_pretrained(directory)
        elif layout == LLAVA_HF:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        else:
            tokenizer = read_original_tokenizer(directory)
    except Exception as error:  # sentencepiece, tokenizers and JSON each have their own
        raise UserError(f"{directory}: its tokenizer cannot be read ({one_line(error)})") from None
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if layout == LLAVA_HF and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the model may have no row for another token
    elif layout != LLAVA_HF and tokenizer.pad_token in (None, tokenizer.unk_token):
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    tokenizer.padding_side = "left"
    return tokenizer


def has_tokenizer(directory: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_folder(directory: Path) -> Path:
    """Return where a checkpoint's tokenizer is: under an adapter of the published code in its base, which it doesn't repeat."""
    if has_tokenizer(directory) or not is_adapter(directory):
        return directory
    return tokenizer_folder(find_checkpoint(base_of(directory), weights=False))


def read_processor(directory: Path, layout: str, values: dict[str, Any], config: Any, tokenizer: Any) -> Any:
    """Return the processor of any layout; `values` is the checkpoint's config.json, `config` what became of it."""
    if layout == FAMILY:
        processor = _whole(AutoProcessor, directory)
        own = getattr(processor, "tokenizer", None)
        if own is None:
            raise UserError(f"{directory}: no tokenizer here (tokenizer.json)")
        own.padding_side = "left"
        own.pad_token = own.pad_token or own.eos_token
        return processor
    texts = tokenizer_folder(directory)
    if not has_tokenizer(texts):
        raise UserError(f"{directory}: no tokenizer here ({' or '.join(TOKENIZER_FILES)})")
    if layout == OWN:
        processor = _whole(AutoProcessor, directory)
        if not isinstance(processor, DynamicLlavaProcessor):
            raise UserError(f"{directory / 'processor_config.json'}: missing, or not written by this package")
        return processor
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
        raise UserError(f"{directory}: config.json and tokenizer disagree about the id of {IMAGE_TOKEN}")
    vision: Any = config.vision_config
    settings = {
        "image_aspect_ratio": config.image_aspect_ratio,
        # Pixels a side of one token: a TokenPacker's block of patches is one.
        "patch_size": vision.patch_size * packed_side(config),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        # CLIP's class token, which the "default" strategy takes off again; a SigLIP has none.
        "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),
    }
    if layout == LLAVA_HF:
        found = _whole(AutoProcessor, directory)
        spacing = original_spacing(directory) if _is_sentencepiece(directory) else "tokenizer"
        return DynamicLlavaProcessor(
            found.image_processor, tokenizer, chat_template=found.chat_template, spacing=spacing, **settings
        )
    return DynamicLlavaProcessor(
        _image_processor(directory, values), tokenizer, spacing=original_spacing(texts), **settings
    )


def _whole(kind: Any, directory: Path) -> Any:
    """Return what transformers reads from a folder, or raise `UserError`."""
    try:
        return kind.from_pretrained(directory)
    except Exception as error:  # tokenizers, JSON and image processors each have their own
        raise UserError(
            f"{directory}: its processor's files are missing or damaged ({one_line(error)})"
        ) from None


def _is_sentencepiece(directory: Path) -> bool:
    """Whether a llava-hf tokenizer came from the original sentencepiece model, so that its rules hold.

    Such a tokenizer.json puts a "▁" before every stretch of text, where the original's newer rule puts none
    after "</s>"; LlamaTokenizer and the processor's spacing give the ids that the weights were trained on.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return True
    normalizer = read_json(file).get("normalizer") or {}
    rules = normalizer.get("normalizers", [normalizer])
    return any(rule.get("type") == "Prepend" and rule.get("prepend") == "▁" for rule in rules)


def _image_processor(directory: Path, values: dict[str, Any]) -> Any:
    """The checkpoint's own preprocessor, else its vision tower's, else CLIP ViT-L/14-336's."""
    if (directory / "preprocessor_config.json").is_file():
        return _whole(AutoImageProcessor, directory)
    if is_clip_l_336(directory, values):
        return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    folder = vision_folder(directory, values, weights=False)
    if not (folder / "preprocessor_config.json").is_file():
        raise UserError(f"{folder}: no preprocessor_config.json for the vision tower of {directory}")
    return _whole(AutoImageProcessor, folder)
