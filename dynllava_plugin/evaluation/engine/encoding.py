"""Requests as tensors: LLaVA-1.5's way, whose images are encoded once, and any other family's, by its own processor."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.evaluation.engine.requests import Request
from dynllava_plugin.images import open_image
from dynllava_plugin.model.processing import DynamicLlavaProcessor
from dynllava_plugin.videos import FRAMES, is_video, open_video

_REMEMBERED = 64  # images whose tensors are kept for the questions that follow
_CAPACITY = 256 * 2**20  # bytes of image features kept: 54 images of LLaVA-1.5 7B in bfloat16


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the vision tower takes it.

    Attributes
    ----------
    key : bytes
        Equal for images with equal pixels after resizing.
    pixels : float32 [3, H, W]
    """

    key: bytes
    pixels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request as the model takes it.

    Attributes
    ----------
    index : int
        Its place in the caller's sequence.
    images : tuple of PreparedImage
        Those that are encoded apart; their questions share batches.
    ids : list of int
        Tokens of the text that the model is given; of an image that is encoded apart one, else all.
    tensors : dict
        The images as arguments of the model, where it encodes them itself.
    """

    index: int
    request: Request
    images: tuple[PreparedImage, ...]
    ids: list[int]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def encoder_of(model: Any, processor: Any) -> Encoder:
    """Return what turns requests into arguments of a loaded model, `processor` being what came with it."""
    kind = LlavaEncoder if isinstance(processor, DynamicLlavaProcessor) else ProcessorEncoder
    return kind(model, processor)


def limit_pixels(processor: Any, least: int | None, most: int | None) -> None:
    """Set how many pixels a processor resizes an image to, at least and at most; its own limit where None.

    Raises
    ------
    UserError
        A processor without such limits, or limits that contradict each other.
    """
    if least is None and most is None:
        return
    size = dict(processor.image_processor.size)
    if size.get("shortest_edge") is None or size.get("longest_edge") is None:
        name = "min_pixels" if least is not None else "max_pixels"
        raise UserError(f"{name}: this checkpoint's images have no such limit (Qwen's have); leave it out")
    least = size["shortest_edge"] if least is None else least
    most = size["longest_edge"] if most is None else most
    if not 0 < least <= most:
        raise UserError(f"min_pixels, max_pixels: {least} to {most} pixels is no range")
    processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}


class Encoder(ABC):
    """Turns requests into what the model takes: one by one in the background, then batch by batch.

    Parameters
    ----------
    model, processor
        As `load_model` gives them.
    """

    window_batches: int  # how many batches are prepared at once, to be sorted by length

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._image_token: str = processor.image_token
        self._video_token: str | None = getattr(processor, "video_token", None)
        self.frames = FRAMES  # of a video

    def look_at(self, frames: int) -> None:
        """Set how many frames of a video are looked at.

        Raises
        ------
        UserError
            None at all, or a checkpoint that reads no videos.
        """
        if not frames > 0 or self._video_token is None:
            reason = (
                "a video needs one" if self._video_token else "this checkpoint reads no videos; leave it out"
            )
            raise UserError(f"video_frames: {frames}; {reason}")
        self.frames = frames

    def prepare(self, index: int, request: Request, text: str) -> Prepared:
        """Return a request, whose place is `index`, with its images read; `text` is what the model is given of it.

        Raises
        ------
        UserError
            For a bad image, or other than one image for each image token.
        """
        markers = [token for token in (self._image_token, self._video_token) if token]
        count = sum(text.count(token) for token in markers)
        if count != len(request.images):
            found = f"{count} {' or '.join(markers)} but {len(request.images)} images came with it"
            raise UserError(f"{request.name}: the prompt has {found}")
        return self._prepare(index, request, text)

    @abstractmethod
    def _prepare(self, index: int, request: Request, text: str) -> Prepared: ...

    @abstractmethod
    def batch(self, items: Sequence[Prepared]) -> dict[str, Any]:
        """Return the model's arguments: `input_ids` and `attention_mask` int64 [B, L], padded on the left, and the images."""

    def images(self, items: Sequence[Prepared]) -> dict[str, Any]:
        """Return `mm_encoder_outputs` of the items' images in order; empty where the model encodes them itself."""
        return {}

    def processed(self, request: Request, text: str) -> Any:
        """Return what the checkpoint's processor makes of `text` and the request's images, as arguments of the model.

        Raises
        ------
        UserError
            For a bad image, or whatever the processor refuses.
        """
        pictures = [open_image(image, request.name) for image in request.images if not is_video(image)]
        videos = [open_video(image, self.frames, request.name) for image in request.images if is_video(image)]
        given: dict[str, Any] = {"images": [pictures]} if pictures else {}
        if videos:
            frames, metadata = zip(*videos, strict=True)
            given |= {"videos": [*frames], "video_metadata": [*metadata], "do_sample_frames": False}
        adds = self._adds_special_tokens(text)
        try:
            found = self._processor(text=[text], return_tensors="pt", add_special_tokens=adds, **given)
        except Exception as error:  # image processors refuse an image each in their own way
            reason = one_line(error)
            raise UserError(f"{request.name}: the checkpoint's processor refuses it ({reason})") from error
        for name in {"pixel_values", "pixel_values_videos"} & {*found}:
            found[name] = found[name].to(self._model.dtype)
        return found

    def token_count(self, text: str) -> int:
        """Return how many tokens a text has, an image counting as one."""
        return len(self._tokens(text))

    def _tokens(self, text: str) -> list[int]:
        return self._processor.tokenizer(text, add_special_tokens=self._adds_special_tokens(text))[
            "input_ids"
        ]

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer puts its own beginning before a text: not where the chat template has written it."""
        bos = self._processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        return padded_on_the_left(rows, self._model.config.image_token_id, self._model.device)


class LlavaEncoder(Encoder):
    """LLaVA-1.5's: every image has the same number of tokens, and one that several questions are about is encoded once."""

    window_batches = 16

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.features = ImageFeatures(model)
        self._recent: OrderedDict[bytes, PreparedImage] = OrderedDict()

    def _prepare(self, index: int, request: Request, text: str) -> Prepared:
        images = tuple(self._image(image, request.name) for image in request.images)
        return Prepared(index, request, images, self._tokens(text))

    def _image(self, image: Any, name: str) -> PreparedImage:
        picture = self._processor.prepare_image(image, name)
        key = hashlib.blake2b(picture.tobytes(), digest_size=16, person=b"%dx%d" % picture.size).digest()
        known = self._recent.pop(key, None)
        if known is None:
            pixels = self._processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
            known = PreparedImage(key, pixels[0])
        self._recent[key] = known
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)
        return known

    def batch(self, items: Sequence[Prepared]) -> dict[str, Any]:
        features, image = self.images(items), self._model.config.image_token_id
        tokens = features["image"].pooler_output.shape[1] if features else 0
        rows = [
            [token for token in item.ids for _ in range(tokens if token == image else 1)] for item in items
        ]
        return {**self._padded(rows), "mm_encoder_outputs": features}

    def images(self, items: Sequence[Prepared]) -> dict[str, Any]:
        return self.features.of([image for item in items for image in item.images])

    def _tokens(self, text: str) -> list[int]:
        return super()._tokens(self._processor.prepare_text(text))


class ImageFeatures:
    """The vision tower's output, computed once for an image that several questions are about; the latest ones kept.

    Parameters
    ----------
    capacity : int
        Bytes.
    """

    def __init__(self, model: Any, capacity: int = _CAPACITY) -> None:
        self._model, self._capacity = model, capacity
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._settings: Any = None
        self.computed = 0  # images that went through the vision tower

    def of(self, images: Sequence[PreparedImage]) -> dict[str, Any]:
        """Return ``{"image": features [M, N, d]}`` of M images in order, as the model takes them; empty without images."""
        if not images:
            return {}
        settings = self._model.config.text_config.sparsity
        if settings != self._settings:  # some policies reduce the patches themselves
            self._kept.clear()
            self._bytes, self._settings = 0, settings
        missing = {image.key: image.pixels for image in images if image.key not in self._kept}
        if missing:
            pixels = torch.stack(list(missing.values())).to(self._model.device, self._model.dtype)
            encoded = self._model.get_image_features(pixel_values=pixels, return_dict=True)
            for key, features in zip(missing, encoded.pooler_output, strict=True):
                self._kept[key] = features
                self._bytes += features.nbytes
            self.computed += len(missing)
        for image in images:
            self._kept.move_to_end(image.key)
        stacked = torch.stack([self._kept[image.key] for image in images])
        while self._bytes > self._capacity and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return {"image": BaseModelOutputWithPooling(pooler_output=stacked)}


class ProcessorEncoder(Encoder):
    """Any other family's: its processor says how many tokens an image has, the model encodes a batch's images."""

    window_batches = 4  # its images may be large, and each question has its own copy

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self._names = (*model.image_inputs, *model.video_inputs, "second_per_grid_ts")

    def _prepare(self, index: int, request: Request, text: str) -> Prepared:
        found = self.processed(request, text)
        tensors = {name: found[name] for name in self._names if name in found}
        return Prepared(index, request, (), found["input_ids"][0].tolist(), tensors)

    def batch(self, items: Sequence[Prepared]) -> dict[str, Any]:
        images = joined_images(self._names, [item.tensors for item in items], self._model.device)
        return {**self._padded([item.ids for item in items]), **images}


def padded_on_the_left(
    rows: Sequence[Sequence[int]], image_token: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` int64 [B, L] of B prompts' ids, where `image_token` is an image's place.

    Before a shorter prompt stands a token of its own, not an image's: a repetition penalty reads the same tokens as without.
    """
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        missing = width - len(row)
        filler = next((token for token in reversed(row) if token != image_token), int(image_token == 0))
        ids.append([filler] * missing + list(row))
        mask.append([0] * missing + [1] * len(row))
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def joined_images(
    names: Sequence[str], prompts: Sequence[Mapping[str, torch.Tensor]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the model's arguments `names` over all prompts, as a processor would give them of the batch.

    A prompt without images has none of them; where no prompt has one, it is left out.
    """
    found = {name: [prompt[name] for prompt in prompts if name in prompt] for name in names}
    return {name: _joined(parts).to(device) for name, parts in found.items() if parts}


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors one behind the other along their first axis, zeros behind what is shorter along the others.

    So a processor itself pads a batch's images: to the most tiles of one (LLaVA-NeXT, OneVision), to the largest (Mistral3).
    """
    most = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [most_of - size for most_of, size in zip(most, part.shape[1:], strict=True)]
        padded.append(pad(part, [count for size in reversed(missing) for count in (0, size)]))
    return torch.cat(padded)
