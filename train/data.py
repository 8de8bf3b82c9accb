"""Samples as tensors: the dataset that opens images, and the collator that pads to the right."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.prompting import VICUNA, style_of
from dynllava_plugin.evaluation.llava_json import Sample
from dynllava_plugin.images import open_image
from dynllava_plugin.model.processing import DynamicLlavaProcessor
from dynllava_plugin.model.prompts import ANSWER_END, IMAGE_TOKEN
from train.chat import ChatEncoder
from train.conversation import IGNORE, ConversationEncoder, Tokens
from train.mixture import Mixture
from train.skipped import MALFORMED, MASKED, TOO_LONG, UNREADABLE, SkippedSamples, UnusableSample

MAX_SKIPS_IN_A_ROW = 100
PROBED = 8  # images of a folder that are opened to know how many tokens one of it has


class ConversationDataset(Dataset):
    """Conversations with their images, ready for the collator.

    A sample that can't be used (too long for the model even without the text behind, with an image that can't be
    decoded or a text that has no labels) is written to `skipped` and the next one takes its place, so that batches keep their size.

    Parameters
    ----------
    mixture : Mixture
    image_folder : path
    encode : ConversationEncoder or ChatEncoder
        Treats text and images as at inference; padding is the collator's.
    max_length : int
        Tokens, image tokens included.
    strict : bool
        A sample that is too long ends the run.
    skipped : SkippedSamples
    """

    def __init__(
        self,
        mixture: Mixture,
        image_folder: str | Path,
        encode: ConversationEncoder | ChatEncoder,
        max_length: int,
        strict: bool,
        skipped: SkippedSamples,
    ) -> None:
        self.mixture = mixture
        self.image_folder = Path(image_folder)
        self.max_length = max_length
        self.strict = strict
        self.skipped = skipped
        self.encode = encode

    def over(self, mixture: Mixture) -> ConversationDataset:
        """Return the dataset of other samples of the same images, treated alike."""
        found = copy.copy(self)
        found.mixture = mixture
        return found

    def __len__(self) -> int:
        return len(self.mixture)

    def name(self, index: int) -> str:
        """Return how errors call a sample."""
        return self.mixture.name(index)

    def lengths(self) -> np.ndarray:
        """int64 [n]: about how many tokens each sample has; an image counts as the mean of a few of its folder."""
        if isinstance(self.encode, ConversationEncoder):
            return self.mixture.lengths(self.encode.tokens_per_image)
        return self.mixture.lengths(self._tokens_by_folder())

    def _tokens_by_folder(self) -> dict[str, float]:
        folders: dict[str, list[str]] = {}
        for image in self.mixture.images():
            folders.setdefault(os.path.dirname(image), []).append(image)
        return {
            folder: self._mean_tokens(images[:: -(-len(images) // PROBED)])
            for folder, images in folders.items()
        }

    def _mean_tokens(self, images: Sequence[str]) -> float:
        """Mean tokens of those images that can be read; 0 where none can."""
        counts = []
        for image in images:
            try:
                (opened,) = open_images(Sample(image, (image,), ()), self.image_folder)
                counts.append(self.encode.image_tokens(opened))
            except UnusableSample:  # said when its turn comes
                continue
        return sum(counts) / max(len(counts), 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`, `labels` (lists of int), `images` (the model's inputs of that name, or None), `sample` (its index)."""
        for step in range(min(len(self), MAX_SKIPS_IN_A_ROW)):
            used = (index + step) % len(self)
            try:
                return self.load(used)
            except UnusableSample as error:
                self.skip(used, error)
        raise UserError(f"{self.skipped.path}: every sample from {index} on is unusable; see there why")

    def skip(self, index: int, error: UnusableSample) -> None:
        """Note an unusable sample; the trainer stops, with a checkpoint, where they are too many."""
        self.skipped.add((int(self.mixture.rows[index]), error.kind, str(error)))
        if error.kind == TOO_LONG and self.strict:
            raise UserError(f"{error}; without --strict it would be skipped") from None

    def load(self, index: int) -> dict[str, Any]:
        """Return one sample, without replacement for an unusable one."""
        sample = self.mixture[index]
        try:
            tokens, images = self.encode.encoded(sample, open_images(sample, self.image_folder))
        except UnusableSample:
            raise
        except UserError as error:  # a placeholder in its text, say
            raise UnusableSample(MALFORMED, str(error)) from None
        if all(label == IGNORE for label in tokens.labels):  # trained on for its image alone, as LLaVA does
            reason = f"{sample.name} has what ends or begins an answer inside a turn: none of it is learned"
            self.skipped.add((int(self.mixture.rows[index]), MASKED, reason))
        tokens = self.truncate(sample, tokens)
        return {"input_ids": tokens.input_ids, "labels": tokens.labels, "images": images, "sample": index}

    def truncate(self, sample: Sample, tokens: Tokens) -> Tokens:
        """Return at most `max_length` tokens, as LLaVA cuts them: at the end, but never through or before an image.

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
    """Return a sample's images, decoded to RGB; `UnusableSample` where one can't be."""
    try:
        return [open_image(image_folder / image) for image in sample.images]
    except UserError as error:
        raise UnusableSample(UNREADABLE, f"{sample.name}: unreadable {error}") from None


def encoder_of(model: Any, processor: Any) -> ConversationEncoder | ChatEncoder:
    """LLaVA-1.5's vicuna_v1 where evaluation asks by it and answers end with `</s>`, else the checkpoint's own chat template."""
    ends = processor.tokenizer.eos_token == ANSWER_END
    if ends and isinstance(processor, DynamicLlavaProcessor) and style_of(model, processor) is VICUNA:
        image = model.config.image_token_id
        return ConversationEncoder(processor, image, count_image_tokens(processor, image))
    return ChatEncoder(processor)


def count_image_tokens(processor: Any, image_token_id: int) -> int:
    """Return how many placeholder tokens the processor makes of one image (LLaVA-1.5: always the same)."""
    blank = Image.new("RGB", (8, 8))
    input_ids = processor(images=[blank], text=[IMAGE_TOKEN], return_tensors="pt")["input_ids"]
    return int((input_ids == image_token_id).sum())


class Collator:
    """Pads samples on the right and stacks them.

    Returns a dict of `input_ids`, `attention_mask`, `labels` [B, L] int64, `sample` [B] int64 (the samples' places in
    the dataset), and the images' inputs. A batch without any image gets one blank one that no place refers to: every
    process must run the same modules in every step.

    Parameters
    ----------
    pad_token_id : int
    blank : dict of tensors
        The inputs of one image, as an encoder's `stand_in` gives them.
    """

    def __init__(self, pad_token_id: int, blank: dict[str, torch.Tensor]) -> None:
        self.pad_token_id, self.blank = pad_token_id, blank

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        images = [row["images"] for row in rows if row["images"] is not None] or [self.blank]
        return {
            "input_ids": _pad([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": _pad([row["labels"] for row in rows], IGNORE),
            "sample": torch.tensor([row["sample"] for row in rows]),
            **{name: _behind([inputs[name] for inputs in images]) for name in images[0]},
        }


def _behind(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first dimension; the others (tiles, or a picture's sides) are padded with 0 to the largest."""
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    padded = []
    for part in parts:
        missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
        padded.append(
            torch.nn.functional.pad(part, [n for size in reversed(missing) for n in (0, size)])
            if any(missing)
            else part
        )
    return torch.cat(padded)


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )
