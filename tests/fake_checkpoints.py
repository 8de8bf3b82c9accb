"""Small checkpoints of every layout: the golden weights and a sentencepiece model trained on the spot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken
from transformers.models.clip import CLIPImageProcessor

from dynllava_plugin.model.checkpoints.tokenizers import from_sentencepiece
from dynllava_plugin.model.prompts import SYSTEM, vicuna_v1

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY = 420


def train_tokenizer(file: Path) -> Path:
    """A Llama-like sentencepiece BPE model (byte fallback, no normalisation) of `VOCABULARY` pieces."""
    corpus = [
        SYSTEM,
        vicuna_v1([("<image>\nWhat color is the shape?", "red"), ("Is there a circle?", "yes")]),
        "Answer the question using a single word or phrase. A blue triangle, a green square; 12 of 345!",
    ] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(file.with_suffix("")),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    return file


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's config.json; `None` removes one."""
    values = {**read_json(folder / "config.json"), **changes}
    write_json(folder / "config.json", {key: value for key, value in values.items() if value is not None})


def edit_weights(folder: Path, remove: str = "\0", **added: torch.Tensor) -> None:
    """Drop the weights whose name contains `remove`, add others."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if remove not in name}
    save_file({**kept, **added}, folder / "model.safetensors")


def published(root: Path, tokenizer: Path, case: str = "mha") -> Path:
    """The published Dynamic-LLaVA layout: `tokenizer.model`, no preprocessor, unknown sparse settings."""
    folder = root / "published"
    shutil.copytree(GOLDEN / case / "checkpoint", folder)
    shutil.copytree(GOLDEN / case / "clip", root / "clip", dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        extra = torch.randn(VOCABULARY - weights[name].shape[0], weights[name].shape[1], generator=generator)
        weights[name] = torch.cat([weights[name], 0.02 * extra])
    save_file(weights, folder / "model.safetensors")
    settings = read_json(folder / "config.json")["sparse_config"]
    settings |= {"maskclip_model": "RN50", "maskclip_threshold": 0.1, "similar_postive_num": 3}
    edit_config(folder, vocab_size=VOCABULARY, model_type="llava_llama", sparse_config=settings)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    (folder / "training_args.bin").write_bytes(b"not to be opened")
    return folder


def original(root: Path, tokenizer: Path) -> Path:
    """The original LLaVA-1.5 layout: no predictors, the vision tower only in its own folder."""
    folder = published(root, tokenizer).rename(root / "original")
    edit_config(folder, sparse_config=None)
    weights = load_file(folder / "model.safetensors")
    kept = {
        name: tensor for name, tensor in weights.items() if "predictor" not in name and "vision" not in name
    }
    save_file(kept, folder / "model.safetensors")
    return folder


HUB_NAMES = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.layers.": "language_model.model.layers.",
    "model.embed_tokens.": "language_model.model.embed_tokens.",
    "model.norm.": "language_model.model.norm.",
    "lm_head.": "language_model.lm_head.",
}
TRANSFORMERS_5_NAMES = {
    **{old: "model." + new for old, new in HUB_NAMES.items()},
    "model.layers.": "model.language_model.layers.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}


def llava_hf(root: Path, tokenizer: Path, names: dict[str, str] | None = None) -> Path:
    """The llava-hf layout under the hub's names (or others), its vocabulary with image and padding tokens."""
    source, folder = published(root / "source", tokenizer), root / "llava-hf"
    folder.mkdir()
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for old, new in (names or HUB_NAMES).items():
            if name.startswith(old):
                weights[new + name.removeprefix(old)] = tensor.contiguous()
    for name in [name for name in weights if "embed_tokens" in name or "lm_head" in name]:
        weights[name] = torch.cat([weights[name], torch.zeros(2, weights[name].shape[1])])
    save_file(weights, folder / "model.safetensors")
    values = read_json(source / "config.json")
    text_keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    text = {
        key: values[key] for key in (text_keys + " max_position_embeddings rms_norm_eps torch_dtype").split()
    }
    vision = read_json(root / "source" / "clip" / "config.json")
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": VOCABULARY,
        "pad_token_id": VOCABULARY + 1,
        "projector_hidden_act": "gelu",
        "text_config": {
            **text,
            "model_type": "llama",
            "vocab_size": VOCABULARY + 2,
            "pad_token_id": VOCABULARY + 1,
        },
        "vision_config": {key: vision[key] for key in vision if key not in ("architectures", "torch_dtype")},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)
    CLIPImageProcessor.from_pretrained(root / "source" / "clip").save_pretrained(folder)
    _save_like_transformers_4(tokenizer, folder)
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": 7,
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    )
    return folder


def _save_like_transformers_4(tokenizer: Path, folder: Path) -> None:
    """tokenizer.json as transformers 4 converted it: a "▁" before every stretch of text."""
    converted = from_sentencepiece(tokenizer)
    for token in ("<image>", "<pad>"):
        converted.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    converted.pad_token = "<pad>"
    converted.save_pretrained(folder)
    values = read_json(folder / "tokenizer.json")
    values["pre_tokenizer"] = None
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    values["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    write_json(folder / "tokenizer.json", values)
    settings = read_json(folder / "tokenizer_config.json")
    write_json(
        folder / "tokenizer_config.json", {**settings, "legacy": False, "processor_class": "LlavaProcessor"}
    )


def as_pytorch(folder: Path) -> Path:
    """The same checkpoint with its weights in pytorch_model.bin."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def as_shards(folder: Path, suffix: str = "safetensors") -> Path:
    """The same checkpoint with its weights in three files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, index = sorted(weights), {}
    for shard in range(3):
        part = {name: weights[name] for name in names[shard::3]}
        file = f"{stem}-{shard + 1:05d}-of-00003.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": index})
    return folder
