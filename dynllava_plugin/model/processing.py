"""Images and prompts to tensors, as the original LLaVA-1.5 code treats them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import AutoProcessor, BatchFeature, LlavaProcessor

from dynllava_plugin.errors import UserError
from dynllava_plugin.images import open_image
from dynllava_plugin.model.families.llava import DynamicLlavaConfig
from dynllava_plugin.model.prompts import CHAT_TEMPLATE, IMAGE_TOKEN

# How `apply_chat_template(..., sanitize_control_tokens=True)` marks tokens in a user's text, which are text.
MARK = "\U000f0000"
MARKED = re.compile(f"{MARK}.*?\U000f0001")


class DynamicLlavaProcessor(LlavaProcessor):
    """`LlavaProcessor` with the original LLaVA-1.5's image padding and token ids, padding on the left.

    `image_aspect_ratio` "pad" extends an image to a square with the mean colour first (LLaVA-1.5), "square" does as `image_processor`
    says. `spacing` tells where text starts with a "▁" piece: by "image" at the start and after every image, because the original
    code tokenizes the text between images on its own; by "special" after every other special token as well, the rule of its
    tokenizers that say "legacy"; by "tokenizer" as the tokenizer does by itself (transformers 5's Llama tokenizer: at the very
    start only, unless the text starts with a space). The other arguments are `LlavaProcessor`'s; the chat template defaults to
    ``vicuna_v1``. Resizing is PIL's, so that pixels do not depend on the image backend which transformers chose.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        num_additional_image_tokens: int = 0,
        image_aspect_ratio: str = "square",
        spacing: str = "tokenizer",
        **kwargs: Any,
    ) -> None:
        if image_aspect_ratio not in ("pad", "square"):
            raise UserError(f"image_aspect_ratio: unknown value {image_aspect_ratio!r}; choose pad or square")
        if spacing not in ("tokenizer", "image", "special"):
            raise UserError(f"spacing: unknown value {spacing!r}; choose tokenizer, image or special")
        self.image_aspect_ratio = image_aspect_ratio
        self.spacing = spacing
        super().__init__(
            image_processor, tokenizer, patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy, chat_template=chat_template or CHAT_TEMPLATE,
            image_token=image_token, num_additional_image_tokens=num_additional_image_tokens, **kwargs,
        )  # fmt: skip
        tokenizer.padding_side = "left"

    def __call__(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        """Return what the model takes of prompts `text`, with one ``<image>`` marker per image, and `images` in that order.

        An image is PIL's, a path, a URL or an [H, W, 3] or [3, H, W] array; `images` may also be a list of one list per sample.
        Other arguments are `LlavaProcessor`'s, e.g. ``padding=True, return_tensors="pt"``. ``input_ids`` and ``attention_mask`` are
        int64 [B, L], a marker repeated once per image token; ``pixel_values`` float32 [number of images, 3, H, W].

        Raises `UserError` for a sample whose markers and images do not match; an image that cannot be read.
        """
        samples = [text] if isinstance(text, str) else text
        groups = _grouped(images, samples, self.image_token)
        if samples is not None:
            shown = [MARKED.sub("", sample) for sample in samples]
            check_markers(shown, groups, self.image_token)
            # A template that writes the tokenizer's token of the beginning: the text begins behind it.
            begin = self.tokenizer.bos_token if kwargs.get("sanitize_control_tokens") else None
            prepared = [
                begin + self.prepare_text(sample.removeprefix(begin))
                if begin and sample.startswith(begin)
                else self.prepare_text(sample)
                for sample in samples
            ]
            text = prepared[0] if isinstance(text, str) else prepared
        flat = [image for group in groups for image in group]
        pixels = [self.prepare_image(image, f"image {index}") for index, image in enumerate(flat)]
        return super().__call__(pixels or None, text, *args, **kwargs)

    def prepare_image(self, image: Any, name: str = "image") -> Image.Image:
        """Return `image` as RGB, made square where the checkpoint says so and resized for the vision tower.

        `name` stands in the error message. What is left to `image_processor` is cropping and normalising.
        """
        picture = open_image(image, name)
        processor = self.image_processor
        resample = Image.Resampling(int(processor.resample))
        size, pads = dict(processor.size), self.image_aspect_ratio == "pad"
        if not processor.do_resize:
            return pad_to_square(picture, processor.image_mean) if pads else picture
        width, height = picture.size
        if pads:
            edge = size.get("shortest_edge")
            target = (edge, edge) if edge else (size["width"], size["height"])
            return _padded_and_resized(picture, processor.image_mean, target, resample)
        if "shortest_edge" not in size:
            target = (size["width"], size["height"])
        else:
            edge, shortest = size["shortest_edge"], min(width, height)
            target = (int(edge * width / shortest), int(edge * height / shortest))
            crop = processor.crop_size
            if processor.do_center_crop and target[0] * target[1] > 4 * (width * height + edge**2):
                return _middle_resized(picture, target, (crop["width"], crop["height"]), resample)
        return picture if target == picture.size else picture.resize(target, resample=resample)

    def prepare_text(self, text: str) -> str:
        """Return `text` with the spaces that make the tokenizer produce the original code's ids (see `spacing`).

        For callers that tokenize a prompt themselves (training labels); the processor's own call does this.
        """
        if self.spacing == "tokenizer":
            return text
        specials = sorted({*self.tokenizer.all_special_tokens, self.image_token}, key=len, reverse=True)
        result, previous = "", self.image_token
        for piece in re.split(f"(?<!{MARK})(" + "|".join(map(re.escape, specials)) + ")", text):
            if not piece:
                continue
            if piece not in specials and (self.spacing == "special" or previous == self.image_token):
                piece = " " + piece
            result += piece
            previous = piece
        return result


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Return `image` centred on a square of the mean colour (`mean`: RGB in 0..1), as LLaVA-1.5 prepares images."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _padded_and_resized(
    image: Image.Image, mean: Sequence[float], target: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Return `pad_to_square` resized to `target` (width, height), pixel by pixel, without a square of the longer side in memory.

    PIL resizes across and then down; across needs a few rows of the square at a time, and none that are padding.
    """
    width, height = image.size
    side, colour = max(width, height), tuple(int(channel * 255) for channel in mean)
    left, top, rows = (side - width) // 2, (side - height) // 2, max(1, 2**22 // side)
    across = Image.new("RGB", (target[0], side), colour)
    for start in range(0, height, rows):
        some = image.crop((0, start, width, min(start + rows, height)))
        padded = Image.new("RGB", (side, some.height), colour)
        padded.paste(some, (left, 0))
        across.paste(padded.resize((target[0], some.height), resample), (0, top + start))
    return across.resize(target, resample)


def _middle_resized(
    image: Image.Image, target: tuple[int, int], crop: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Return the middle `crop` (width, height) of `image` resized to `target`, without computing what is cut off.

    For small pictures far longer than wide: a value may be one or two off, because PIL takes a part's edges as 32-bit floats.
    """
    parts = []  # of each axis: the wanted length, and where it begins and ends in the picture
    for length, whole, wanted in zip(image.size, target, crop, strict=True):
        wanted = min(wanted, whole)
        start, scale = (whole - wanted) // 2, length / whole
        parts.append((wanted, start * scale, (start + wanted) * scale))
    (width, left, right), (height, top, bottom) = parts
    # First across, then down, as PIL does it.
    across = image.resize((width, image.height), resample, box=(left, 0, right, image.height))
    return across.resize((width, height), resample, box=(0, top, width, bottom))


def check_markers(samples: Sequence[str], groups: Sequence[Sequence[Any]], marker: str = IMAGE_TOKEN) -> None:
    """Raise a `UserError` naming the first sample whose image markers and images differ in number."""
    for index, (sample, images) in enumerate(zip(samples, groups, strict=True)):
        if sample.count(marker) != len(images):
            found = f"{sample.count(marker)} {marker} marker(s) in the prompt but {len(images)} image(s)"
            raise UserError(f"sample {index}: {found}")


def _grouped(images: Any, samples: Sequence[str] | None, marker: str) -> list[list[Any]]:
    """One list of images per sample; a flat list is dealt out by the samples' markers, in order."""
    flat: list[Any] = (
        list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    )
    if samples is None:
        return [flat]
    if flat and all(isinstance(group, (list, tuple)) for group in flat):
        if len(flat) != len(samples):
            raise UserError(
                f"{len(flat)} lists of images for {len(samples)} prompts; give one list per prompt"
            )
        return [list(group) for group in flat]
    groups: list[list[Any]] = []
    for sample in samples:
        count = sample.count(marker)
        groups.append(flat[:count])
        flat = flat[count:]
    if flat and groups:
        groups[-1] += flat  # too many: reported for the last sample
    return groups


AutoProcessor.register(DynamicLlavaConfig, DynamicLlavaProcessor)
