"""A Llama-like tokenizer, a LLaVA of a few thousand parameters and made-up samples, for training tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, PreTrainedTokenizerFast

from dynllava_plugin import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityConfig
from dynllava_plugin.model.families.text_models import DynamicLlamaConfig
from dynllava_plugin.model.processing import DynamicLlavaProcessor
from dynllava_plugin.model.prompts import IMAGE_TOKEN, vicuna_v1

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN]
IMAGE_TOKENS = 16
WORDS = "what color is the shape on left red blue green circle square yes no there a"
LONG_ANSWER = " ".join(["there is a red circle left, a blue square and no green shape."] * 4)


def tokenizer(kind: str = "llama") -> PreTrainedTokenizerFast:
    """ "llama": "▁" in front and for blanks, bytes for what is unknown; "bytes": as GPT-2."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(kind)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        clean_up_tokenization_spaces=False,
    )


@cache
def _tokenizer_json(kind: str) -> str:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [vicuna_v1([(WORDS, LONG_ANSWER), (WORDS, "yes")]).replace("</s>", " ")] * 3
    if kind == "bytes":
        built = Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        built.train_from_iterator(texts, trainer)
        after: Any = processors.ByteLevel(trim_offsets=True)
    else:
        # No merges across blanks while training; Llama itself has no pre-tokenizer, so none is left after.
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        trained.train_from_iterator(texts, trainer)
        model = json.loads(trained.to_str())["model"]
        pieces = SPECIAL + bytes_ + sorted(model["vocab"], key=model["vocab"].get)
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        merges = [tuple(pair) for pair in model["merges"]]
        built = Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        built.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        built.add_special_tokens(SPECIAL)
        after = None
    begin = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    built.post_processor = processors.Sequence([after, begin]) if after else begin
    return built.to_str()


def processor(kind: str = "llama", **options: Any) -> DynamicLlavaProcessor:
    """A processor of 32x32 images, 16 tokens each."""
    size = {"height": 32, "width": 32}
    return DynamicLlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer(kind),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_aspect_ratio="pad",
        **options,
    )


def save_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A fresh model of 4 layers x 32 with its processor."""
    torch.manual_seed(seed)
    ready = processor()
    vocabulary = len(ready.tokenizer)
    sparsity = SparsityConfig(predictor_dim=16, predictor_heads=2, predictor_ffn_dim=32, predictor_layers=1)
    config = DynamicLlavaConfig(
        text_config=DynamicLlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2048,
            bos_token_id=SPECIAL.index("<s>"),
            eos_token_id=SPECIAL.index("</s>"),
            pad_token_id=SPECIAL.index("<pad>"),
            sparsity=sparsity,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        ).to_dict(),
        image_token_index=SPECIAL.index(IMAGE_TOKEN),
        image_token_id=SPECIAL.index(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = DynamicLlavaForConditionalGeneration(config)
    # Built rather than loaded, a LLaVA is saved under the names of an old transformers: so load it first.
    model = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    model.save_pretrained(folder)
    ready.save_pretrained(folder)
    return folder


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """LLaVA's `conversations` from (question, answer) pairs."""
    return [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]


def save_mixture(folder: Path, samples: int = 8) -> tuple[Path, Path]:
    """Samples of one to three turns, every other one with a long last answer: (JSON, image folder)."""
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}
    images = folder / "images"
    images.mkdir(parents=True)
    rows = []
    for index in range(samples):
        color = list(colors)[index % 3]
        Image.new("RGB", (32, 20 + index), colors[color]).save(images / f"{index}.png")
        turns = [("<image>\nwhat color is the shape", color)] + [("is there a circle", "no")] * (index % 3)
        if index % 2:
            turns.append(("what is there", LONG_ANSWER))
        rows.append({"id": f"s{index}", "image": f"{index}.png", "conversations": conversation(*turns)})
    rows.append({"id": "text", "conversations": conversation(("is blue a color", "yes"))})
    mixture = folder / "mix.json"
    mixture.write_text(json.dumps(rows))
    return mixture, images
