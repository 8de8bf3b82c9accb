"""Samples as tensors: the dataset that opens images, and the collator that pads to the right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch.utils.data import Dataset

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import IMAGE_TOKEN
from train.conversation import IGNORE, ConversationEncoder, Tokens
from train.mixture import Mixture
from train.samples import Sample
from train.skipped import TOO_LONG, UNREADABLE, SkippedSamples, too_many

MAX_SKIPS_IN_A_ROW = 100


class UnusableSample(UserError):
    """One sample cannot be trained on; the message names it, `kind` says in what way."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ConversationDataset(Dataset):
    """Conversations with their images, ready for the collator.

    A sample that can't be used (too long for the model even without the text behind, or with an image that can't
    be decoded) is written to `skipped` and the next one takes its place, so that batches keep their size.

    Parameters
    ----------
    mixture : Mixture
    image_folder : path
    processor : DynamicLlavaProcessor
        Treats text and images as at inference; padding is the collator's.
    image_token_id : int
    max_length : int
        Tokens, image tokens included.
    max_unreadable : int
        Samples with an unreadable image that are skipped; one more ends the run.
    strict : bool
        A sample that is too long ends the run.
    skipped : SkippedSamples
    """

    def __init__(
        self,
        mixture: Mixture,
        image_folder: str | Path,
        processor: Any,
        image_token_id: int,
        max_length: int,
        max_unreadable: int,
        strict: bool,
        skipped: SkippedSamples,
    ) -> None:
        self.mixture = mixture
        self.image_folder = Path(image_folder)
        self.processor = processor
        self.max_length = max_length
        self.max_unreadable = max_unreadable
        self.strict = strict
        self.skipped = skipped
        self.tokens_per_image = count_image_tokens(processor, image_token_id)
        self.encode = ConversationEncoder(processor, image_token_id, self.tokens_per_image)

    def __len__(self) -> int:
        return len(self.mixture)

    def name(self, index: int) -> str:
        """How errors call a sample."""
        return self.mixture.name(index)

    def lengths(self) -> np.ndarray:
        """int64 [n]: about how many tokens each sample has, without opening any image."""
        return self.mixture.lengths(self.tokens_per_image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`, `labels` (lists of int), `pixel_values` [images, 3, H, W], `sample` (its index)."""
        for step in range(min(len(self), MAX_SKIPS_IN_A_ROW)):
            used = (index + step) % len(self)
            try:
                return self.load(used)
            except UnusableSample as error:
                self.skip(used, error)
        raise UserError(f"{self.skipped.path}: every sample from {index} on is unusable; see there why")

    def skip(self, index: int, error: UnusableSample) -> None:
        """Note an unusable sample, or end the run where that is one too many."""
        count = self.skipped.add(int(self.mixture.rows[index]), error.kind, str(error))
        if error.kind == UNREADABLE and count > self.max_unreadable:
            raise too_many(str(error), count, self.skipped.path) from None
        if error.kind == TOO_LONG and self.strict:
            raise UserError(f"{error}; without --strict it would be skipped") from None

    def load(self, index: int) -> dict[str, Any]:
        """One sample, without replacement for an unusable one."""
        sample = self.mixture[index]
        tokens = self.truncate(sample, self.encode(sample))
        images = [self.processor.prepare_image(image) for image in open_images(sample, self.image_folder)]
        if images:
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        else:
            pixels = None
        return {
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "pixel_values": pixels,
            "sample": index,
        }

    def truncate(self, sample: Sample, tokens: Tokens) -> Tokens:
        """At most `max_length` tokens, as LLaVA cuts them: at the end, but never through or before an image.

        Raises
        ------
        UnusableSample
            The cut would take image tokens, or leave no answer to learn.
        """
        if len(tokens.input_ids) <= self.max_length:
            return tokens
        cut = Tokens(tokens.input_ids[: self.max_length], tokens.labels[: self.max_length])
        if self.encode.image_token_id in tokens.input_ids[self.max_length :]:
            loss = "cutting it there would cut an image"
        elif all(label == IGNORE for label in cut.labels):
            loss = "cutting it there leaves no answer"
        else:
            return cut
        raise UnusableSample(
            TOO_LONG,
            f"{sample.name} has {len(tokens.input_ids)} tokens, over --model_max_length {self.max_length}, and {loss}",
        )


def open_images(sample: Sample, image_folder: Path) -> list[Image.Image]:
    """A sample's images, decoded to RGB; `UnusableSample` where one can't be."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # an imported library may have had them filled with gray
    images = []
    for image in sample.images:
        path = image_folder / image
        try:
            with Image.open(path) as file:
                images.append(file.convert("RGB"))
        except Exception as error:  # corrupt files raise anything from SyntaxError to struct.error
            reason = " ".join(str(error).split())
            raise UnusableSample(
                UNREADABLE, f"{path}: unreadable image ({reason}), needed by {sample.name}"
            ) from None
    return images


def count_image_tokens(processor: Any, image_token_id: int) -> int:
    """How many placeholder tokens the processor makes of one image (LLaVA-1.5: always the same)."""
    blank = Image.new("RGB", (8, 8))
    input_ids = processor(images=[blank], text=[IMAGE_TOKEN], return_tensors="pt")["input_ids"]
    return int((input_ids == image_token_id).sum())


class Collator:
    """Pads samples on the right and stacks them.

    Returns a dict of `input_ids`, `attention_mask`, `labels` [B, L] int64, `pixel_values` [images, 3, H, W]
    float32 and `sample` [B] int64, the samples' places in the dataset. A batch without any image gets one blank
    one that no place refers to: every process must run the same modules in every step.

    Parameters
    ----------
    pad_token_id : int
    blank : float32 [1, 3, H, W]
        As from `blank_image`.
    """

    def __init__(self, pad_token_id: int, blank: torch.Tensor) -> None:
        self.pad_token_id, self.blank = pad_token_id, blank

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        images = [row["pixel_values"] for row in rows if row["pixel_values"] is not None]
        return {
            "input_ids": _pad([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": _pad([row["labels"] for row in rows], IGNORE),
            "pixel_values": torch.cat(images or [self.blank]),
            "sample": torch.tensor([row["sample"] for row in rows]),
        }


def blank_image(processor: Any) -> torch.Tensor:
    """float32 [1, 3, H, W]: an image of the size the processor makes."""
    image = processor.prepare_image(Image.new("RGB", (8, 8)))
    return processor.image_processor([image], return_tensors="pt")["pixel_values"]


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )
