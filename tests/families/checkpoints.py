"""Tiny stock models, processors and checkpoint folders of every family, as from its hub.

`FAMILIES` says what each family is made of; `stock_model` builds a random model of the stock class, `write_checkpoint`
its folder, `sample_batch` what the family's own processor gives for a batch of conversations. Four LLM layers, 64
wide, 4 heads on 2 of keys and values; images of 28 to 84 pixels have 4 to about 100 tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.models.clip import CLIPImageProcessor
from transformers.models.got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl import InternVLVideoProcessor
from transformers.models.llava_next import LlavaNextImageProcessor
from transformers.models.llava_next_video import LlavaNextVideoVideoProcessor
from transformers.models.llava_onevision import LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor
from transformers.models.pixtral import PixtralImageProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.siglip import SiglipImageProcessor

from tests.families import templates, words

LAYERS = 4
HEAD_DIM = 16
_TILE = 28  # pixels a side of a CLIP or SigLIP tile, of 4 x 4 patches
_HALF = [0.5, 0.5, 0.5]
_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN_VL = [*_QWEN, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]


@dataclass(frozen=True)
class Family:
    """What a family's checkpoint is made of."""

    hub: str  # the checkpoint whose files these are like
    model_class: str
    image_token: str
    template: str
    tokenizer: Callable[[], Any]
    processor: Callable[[Any, str], ProcessorMixin]  # from a tokenizer and a chat template
    config: Callable[[Any], dict[str, Any]]  # the model's config, from its tokenizer
    generation: dict[str, Any] = field(
        default_factory=dict
    )  # what the hub's generation_config.json sets besides ids


def _text(model_type: str, tokenizer: Any, **more: Any) -> dict[str, Any]:
    return dict(
        model_type=model_type, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, head_dim=HEAD_DIM,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False, **more,
    )  # fmt: skip


def _vision(model_type: str, patch: int = 7, image: int = _TILE, layers: int = 3) -> dict[str, Any]:
    return dict(
        model_type=model_type, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        image_size=image, patch_size=patch,
    )  # fmt: skip


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


# LLaVA-1.5


def _llava_config(tokenizer: Any, text: dict[str, Any], clip: bool = True) -> dict[str, Any]:
    return dict(
        text_config=text,
        vision_config=_vision("clip_vision_model") if clip else _siglip(),
        image_token_index=_id(tokenizer, "<image>"),
        image_seq_length=16,
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
    )


def _siglip() -> dict[str, Any]:
    return dict(**_vision("siglip_vision_model"), vision_use_head=False)


def _llava_processor(tokenizer: Any, template: str, clip: bool = True) -> ProcessorMixin:
    size = {"height": _TILE, "width": _TILE}
    if clip:
        images = CLIPImageProcessor(size={"shortest_edge": _TILE}, crop_size=size, do_convert_rgb=True)
    else:
        images = SiglipImageProcessor(size=size, do_convert_rgb=True)
    return transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=7, chat_template=template, image_token="<image>",
        num_additional_image_tokens=int(clip), vision_feature_select_strategy="default" if clip else "full",
    )  # fmt: skip


# LLaVA-NeXT and OneVision: the whole image in one tile, and the same cut into tiles

_NEXT_GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
_ONEVISION_GRIDS = [[_TILE * high, _TILE * wide] for high in range(1, 7) for wide in range(1, 7)]


def _next_config(tokenizer: Any) -> dict[str, Any]:
    text = _text("mistral", tokenizer, sliding_window=None, rope_theta=1e6)
    return _llava_config(tokenizer, text) | dict(image_grid_pinpoints=_NEXT_GRIDS)


def _next_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    size = {"height": _TILE, "width": _TILE}
    images = LlavaNextImageProcessor(
        size={"shortest_edge": _TILE}, crop_size=size, image_grid_pinpoints=_NEXT_GRIDS
    )
    return transformers.LlavaNextProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=7, chat_template=template, image_token="<image>",
        num_additional_image_tokens=1, vision_feature_select_strategy="default",
    )  # fmt: skip


def _onevision_config(tokenizer: Any) -> dict[str, Any]:
    return dict(
        text_config=_text("qwen2", tokenizer, rope_theta=1e6),
        vision_config=_siglip(),
        image_token_index=_id(tokenizer, "<image>"),
        video_token_index=_id(tokenizer, "<video>"),
        image_grid_pinpoints=_ONEVISION_GRIDS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def _onevision_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    size = {"height": _TILE, "width": _TILE}
    return transformers.LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=_ONEVISION_GRIDS, image_mean=_HALF, image_std=_HALF
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size, image_mean=_HALF, image_std=_HALF),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=template,
    )


# Qwen2.5-VL and Qwen3-VL: a token for every 14 x 14 or 16 x 16 pixels


def _qwen_vl_ids(tokenizer: Any) -> dict[str, Any]:
    return dict(
        image_token_id=_id(tokenizer, "<|image_pad|>"),
        video_token_id=_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=False,
    )


def _qwen2_5_vl_config(tokenizer: Any) -> dict[str, Any]:
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e6)
    text = _text("qwen2_5_vl_text", tokenizer, rope_parameters=rope)
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=7, window_size=28, out_hidden_size=64,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    return dict(text_config=text, vision_config=vision, **_qwen_vl_ids(tokenizer))


def _qwen2_5_vl_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    settings = dict(patch_size=7, size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112})
    return transformers.Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**settings),
        chat_template=template,
    )


def _qwen3_vl_config(tokenizer: Any) -> dict[str, Any]:
    rope = dict(rope_type="default", mrope_section=[4, 2, 2], mrope_interleaved=True, rope_theta=5e6)
    text = _text("qwen3_vl_text", tokenizer, rope_parameters=rope)
    vision = dict(
        depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, out_hidden_size=64,
        num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2],
    )  # fmt: skip
    return dict(text_config=text, vision_config=vision, **_qwen_vl_ids(tokenizer))


def _qwen3_vl_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    settings = dict(
        patch_size=8, image_mean=_HALF, image_std=_HALF, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    )  # fmt: skip
    return transformers.Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**settings),
        chat_template=template,
    )


# Their relatives: an older one, one with experts, one for videos, and InternVL 3.5's LLM


def _qwen2_vl_config(tokenizer: Any) -> dict[str, Any]:
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e6)
    text = _text("qwen2_vl_text", tokenizer, rope_parameters=rope)
    vision = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=7, mlp_ratio=2)
    return dict(text_config=text, vision_config=vision, **_qwen_vl_ids(tokenizer))


def _qwen2_vl_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    made = _qwen2_5_vl_processor(tokenizer, template)
    return transformers.Qwen2VLProcessor(
        image_processor=made.image_processor, tokenizer=tokenizer, video_processor=made.video_processor,
        chat_template=template,
    )  # fmt: skip


def _qwen3_vl_moe_config(tokenizer: Any) -> dict[str, Any]:
    made = _qwen3_vl_config(tokenizer)
    experts = dict(
        model_type="qwen3_vl_moe_text", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    )
    return made | dict(text_config=made["text_config"] | experts)


def _next_video_config(tokenizer: Any) -> dict[str, Any]:
    text = _text("llama", tokenizer)
    video = dict(video_token_index=_id(tokenizer, "<video>"), image_grid_pinpoints=_NEXT_GRIDS)
    return _llava_config(tokenizer, text) | video


def _next_video_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    size = {"height": _TILE, "width": _TILE}
    return transformers.LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": _TILE}, crop_size=size, image_grid_pinpoints=_NEXT_GRIDS
        ),
        video_processor=LlavaNextVideoVideoProcessor(size={"shortest_edge": _TILE}, crop_size=size),
        tokenizer=tokenizer, patch_size=7, chat_template=template, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def _internvl_qwen3_config(tokenizer: Any) -> dict[str, Any]:
    return _internvl_config(tokenizer) | dict(text_config=_text("qwen3", tokenizer, rope_theta=1e6))


# InternVL: tiles of 16 tokens, and the whole image behind them where there are several


def _internvl_tokenizer() -> Any:
    names = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )  # fmt: skip
    return words.qwen2("<|endoftext|>", "<|im_end|>", [*_QWEN, *names.values()], names)


def _internvl_config(tokenizer: Any) -> dict[str, Any]:
    vision = _vision("internvl_vision", image=56, layers=2) | dict(image_size=[56, 56], patch_size=[7, 7])
    return dict(
        text_config=_text("qwen2", tokenizer, rope_theta=1e6),
        vision_config=vision,
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _internvl_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    size = {"height": 56, "width": 56}
    return transformers.InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=template,
    )


# Mistral3: a token for every 14 x 14 pixels, rows ended by [IMG_BREAK]


def _mistral3_config(tokenizer: Any) -> dict[str, Any]:
    return dict(
        text_config=_text("mistral", tokenizer, sliding_window=None, rope_theta=1e9),
        vision_config=_vision("pixtral", image=112, layers=2) | dict(head_dim=HEAD_DIM),
        image_token_index=_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _mistral3_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    return transformers.PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size=7, size={"longest_edge": 112}),
        tokenizer=tokenizer,
        patch_size=7,
        spatial_merge_size=2,
        chat_template=template,
        image_token="[IMG]",
    )


FAMILIES: dict[str, Family] = {
    "llava_llama": Family(
        "llava-hf/llava-1.5-7b-hf", "LlavaForConditionalGeneration", "<image>", templates.LLAVA,
        lambda: words.llama("<image>", "<pad>"), _llava_processor,
        lambda tokenizer: _llava_config(tokenizer, _text("llama", tokenizer)),
    ),
    "llava_qwen2": Family(
        "llava-hf/llava-interleave-qwen-0.5b-hf", "LlavaForConditionalGeneration", "<image>", templates.LLAVA_QWEN2,
        lambda: words.qwen2("<|endoftext|>", "<|im_end|>", [*_QWEN, "<image>"]),
        functools.partial(_llava_processor, clip=False),
        lambda tokenizer: _llava_config(tokenizer, _text("qwen2", tokenizer, rope_theta=1e6), clip=False),
    ),
    "llava_mistral": Family(
        "llava-hf/bakLlava-v1-hf", "LlavaForConditionalGeneration", "<image>", templates.LLAVA,
        lambda: words.llama("<image>", "<pad>"), _llava_processor,
        lambda tokenizer: _llava_config(tokenizer, _text("mistral", tokenizer, sliding_window=4096)),
    ),
    "llava_next": Family(
        "llava-hf/llava-v1.6-mistral-7b-hf", "LlavaNextForConditionalGeneration", "<image>", templates.LLAVA_NEXT,
        lambda: words.llama("<image>", "<pad>"), _next_processor, _next_config,
    ),
    "llava_onevision": Family(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", "LlavaOnevisionForConditionalGeneration", "<image>",
        templates.LLAVA_ONEVISION, lambda: words.qwen2("<|endoftext|>", "<|im_end|>", [*_QWEN, "<image>", "<video>"]),
        _onevision_processor, _onevision_config,
    ),
    "qwen2_5_vl": Family(
        "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2_5_VLForConditionalGeneration", "<|image_pad|>", templates.QWEN2_5_VL,
        lambda: words.qwen2("<|endoftext|>", "<|im_end|>", _QWEN_VL), _qwen2_5_vl_processor, _qwen2_5_vl_config,
        dict(do_sample=True, temperature=1e-6, repetition_penalty=1.05),
    ),
    "qwen3_vl": Family(
        "Qwen/Qwen3-VL-8B-Instruct", "Qwen3VLForConditionalGeneration", "<|image_pad|>", templates.QWEN3_VL,
        lambda: words.qwen2("<|endoftext|>", "<|im_end|>", _QWEN_VL), _qwen3_vl_processor, _qwen3_vl_config,
        dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.0),
    ),
    "internvl": Family(
        "OpenGVLab/InternVL3-8B-hf", "InternVLForConditionalGeneration", "<IMG_CONTEXT>", templates.INTERNVL,
        _internvl_tokenizer, _internvl_processor, _internvl_config,
    ),
    "mistral3": Family(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "Mistral3ForConditionalGeneration", "[IMG]",
        templates.MISTRAL3, words.tekken, _mistral3_processor, _mistral3_config,
    ),
}  # fmt: skip
# Those that go ways of the others': in the tests of the model, not in those of the harnesses and of training.
RELATIVES: dict[str, Family] = {
    "qwen2_vl": Family(
        "Qwen/Qwen2-VL-7B-Instruct", "Qwen2VLForConditionalGeneration", "<|image_pad|>", templates.QWEN2_5_VL,
        lambda: words.qwen2("<|endoftext|>", "<|im_end|>", _QWEN_VL), _qwen2_vl_processor, _qwen2_vl_config,
    ),
    "qwen3_vl_moe": Family(
        "Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen3VLMoeForConditionalGeneration", "<|image_pad|>", templates.QWEN3_VL,
        lambda: words.qwen2("<|endoftext|>", "<|im_end|>", _QWEN_VL), _qwen3_vl_processor, _qwen3_vl_moe_config,
    ),
    "llava_next_video": Family(
        "llava-hf/LLaVA-NeXT-Video-7B-hf", "LlavaNextVideoForConditionalGeneration", "<image>",
        templates.LLAVA_NEXT_VIDEO, lambda: words.llama("<image>", "<video>", "<pad>"), _next_video_processor,
        _next_video_config,
    ),
    "internvl_qwen3": Family(
        "OpenGVLab/InternVL3_5-8B-HF", "InternVLForConditionalGeneration", "<IMG_CONTEXT>", templates.INTERNVL,
        _internvl_tokenizer, _internvl_processor, _internvl_qwen3_config,
    ),
}  # fmt: skip
EVERY = FAMILIES | RELATIVES


@functools.cache
def stock_processor(family: str) -> ProcessorMixin:
    """The family's processor class with a small tokenizer and the hub's chat template, padding on the left."""
    made = EVERY[family]
    return made.processor(made.tokenizer(), made.template)


def stock_config(family: str) -> Any:
    """The config of `stock_model(family)`."""
    made = EVERY[family]
    return getattr(transformers, made.model_class).config_class(
        **made.config(stock_processor(family).tokenizer)
    )


def stock_model(family: str, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """A random model of the family's stock class: float32, eval, far from uniform attention and from tied logits.

    `text` overrides settings of the text config, such as `num_hidden_layers=8`.
    """
    config = stock_config(family)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config._attn_implementation = attention
    model = getattr(transformers, EVERY[family].model_class)(config).float().eval()
    _randomize(model, seed)
    tokenizer = stock_processor(family).tokenizer
    _never_name_placeholders(model, tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Every weight anew, from its own shape: products of about 1.6, scales about 1, biases that count."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if "embed_tokens" in name:
            parameter.copy_(values)
        elif parameter.dim() > 1:
            parameter.copy_(values * 1.6 / (parameter.numel() / parameter.shape[0]) ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(values * 0.1)
        else:
            parameter.copy_(1 + 0.2 * values)


@torch.no_grad()
def _never_name_placeholders(model: PreTrainedModel, tokenizer: Any) -> None:
    """As in a trained head: special tokens but the end of the text have logits that never win."""
    special = [number for number in tokenizer.added_tokens_decoder if number != tokenizer.eos_token_id]
    model.get_output_embeddings().weight[special] = 0


def write_checkpoint(family: str, folder: Path | str, seed: int = 0) -> Path:
    """A folder as from the hub: weights, config, generation settings, the processor's files and chat template."""
    folder = Path(folder)
    model = stock_model(family, seed)
    model.generation_config.update(**EVERY[family].generation)
    model.save_pretrained(folder)
    stock_processor(family).save_pretrained(folder)
    return folder


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """An RGB image, `size` = (width, height): coarse random patches, so that its parts look different."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.BICUBIC)


def conversation(
    question: str, images: int | Sequence[str], answer: str | None = None
) -> list[dict[str, Any]]:
    """One turn in the form that every chat template takes, its images, or what else is named, first."""
    kinds = ["image"] * images if isinstance(images, int) else images
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def prompt_of(processor: Any, question: str, images: int | Sequence[str]) -> str:
    """The text that the family's chat template makes of a question, up to where the answer begins."""
    turns = conversation(question, images)
    return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def sample_batch(
    family: str,
    processor: Any,
    sizes: Sequence[Sequence[tuple[int, ...]]],
    questions: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """What the processor returns for a batch of conversations, padded on the left.

    `sizes[i]` are the (width, height) of the images of sample i, none, one or several, of a video (width, height, frames), where
    the family has videos; `questions[i]` its question.
    A template that writes "<s>" itself gets no second one, as in the processor's own `apply_chat_template(tokenize=True)`.
    """
    samples = range(len(questions))
    return _process(family, processor, [(i, sizes[i], questions[i]) for i in samples], seed)


def sample_of(
    family: str,
    processor: Any,
    sizes: Sequence[Sequence[tuple[int, ...]]],
    questions: Sequence[str],
    index: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Sample `index` of the same `sample_batch` alone: its text, its images, no padding of either."""
    return _process(family, processor, [(index, sizes[index], questions[index])], seed)


def _process(
    family: str, processor: Any, samples: list[tuple[int, Sequence[tuple[int, ...]], str]], seed: int
) -> dict[str, Any]:
    assert processor.image_token == EVERY[family].image_token, f"not a processor of {family}"
    texts = [
        prompt_of(processor, question, ["image" if len(size) == 2 else "video" for size in of])
        for _, of, question in samples
    ]
    images = [_pictures([size for size in of if len(size) == 2], index, seed) for index, of, _ in samples]
    videos = [
        _pictures([size[:2]] * size[2], 10 * index + number, seed)
        for index, of, _ in samples
        for number, size in enumerate(of)
        if len(size) == 3
    ]
    bos = processor.tokenizer.bos_token
    doubled = bos is not None and texts[0].startswith(bos)
    more: dict[str, Any] = {"images": images} if any(images) else {}
    more |= {"videos": videos} if videos else {}
    batch = processor(
        text=texts,
        padding=True,
        return_tensors="pt",
        add_special_tokens=not doubled,
        padding_side="left",
        **more,
    )
    return dict(batch)


def _pictures(sizes: Sequence[Any], index: int, seed: int) -> list[Image.Image]:
    """The images of sample `index`, the same ones in a batch and alone."""
    return [picture(size, 10_000 * seed + 100 * index + number) for number, size in enumerate(sizes)]


def image_places(
    family: str, processor: Any, sizes: Sequence[tuple[int, int]], inputs: dict[str, Any]
) -> list[torch.Tensor]:
    """Where each image of one unpadded sample stands: a tensor of places an image, in order.

    Counted by the processor with an end-of-text token between the images: neighbours may touch (OneVision), and one
    image may be several stretches (Mistral3's rows).
    """
    if not sizes:
        return []
    image, end = EVERY[family].image_token, processor.tokenizer.eos_token
    pictures = _pictures(sizes, 0, 0)
    ids = processor(images=[pictures], text=[end.join([image] * len(sizes))], return_tensors="pt")[
        "input_ids"
    ][0]
    number = _id(processor.tokenizer, image)
    borders = [0, *(ids == processor.tokenizer.eos_token_id).nonzero()[:, 0].tolist(), len(ids)]
    counts = [int((ids[a:b] == number).sum()) for a, b in itertools.pairwise(borders)]
    return list((inputs["input_ids"][0] == number).nonzero()[:, 0].split(counts))
