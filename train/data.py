"""Samples as tensors: the dataset that opens images, and the collator that pads to the right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFile
from torch.utils.data import Dataset

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import IMAGE_TOKEN
from train.conversation import IGNORE, ConversationEncoder
from train.samples import Sample

MAX_SKIPS_IN_A_ROW = 100


class UnusableSample(UserError):
    """One sample cannot be trained on; the message names it."""


class ConversationDataset(Dataset):
    """Conversations with their images, ready for the collator.

    An unusable sample (too long for the model, or an unreadable image where `skip_unreadable` allows that) is
    written to `skipped_file` and the next one takes its place, so that batches keep their size.

    Parameters
    ----------
    samples : list of Sample
    image_folder : path
    processor : DynamicLlavaProcessor
        Treats text and images as at inference; padding is the collator's.
    image_token_id : int
    max_length : int
        Tokens, image tokens included.
    skip_unreadable : bool
        Skip samples whose image can't be decoded instead of raising.
    skipped_file : path
        JSON lines, appended to by every data-loading process.
    """

    def __init__(
        self,
        samples: list[Sample],
        image_folder: str | Path,
        processor: Any,
        image_token_id: int,
        max_length: int,
        skip_unreadable: bool,
        skipped_file: str | Path,
    ) -> None:
        self.samples = samples
        self.image_folder = Path(image_folder)
        self.processor = processor
        self.max_length = max_length
        self.skip_unreadable = skip_unreadable
        self.skipped_file = Path(skipped_file)
        self.encode = ConversationEncoder(
            processor, image_token_id, count_image_tokens(processor, image_token_id)
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`, `labels` (lists of int), `pixel_values` [images, 3, H, W], `sample` (its index)."""
        for step in range(min(len(self), MAX_SKIPS_IN_A_ROW)):
            used = (index + step) % len(self)
            try:
                return self.load(used)
            except UnusableSample as error:
                with self.skipped_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"sample": used, "reason": str(error)}) + "\n")
        raise UserError(f"{self.skipped_file}: every sample from {index} on is unusable; see there why")

    def load(self, index: int) -> dict[str, Any]:
        """One sample, without replacement for an unusable one."""
        sample = self.samples[index]
        tokens = self.encode(sample)
        if len(tokens.input_ids) > self.max_length:
            raise UnusableSample(
                f"{sample.name} has {len(tokens.input_ids)} tokens, over --model_max_length {self.max_length}"
            )
        images = [self.processor.prepare_image(self.open(sample, image)) for image in sample.images]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return {
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "pixel_values": pixels,
            "sample": index,
        }

    def open(self, sample: Sample, image: str) -> Image.Image:
        """Decode one image of a sample to RGB."""
        path = self.image_folder / image
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # an imported library may have had them filled with gray
        try:
            with Image.open(path) as file:
                return file.convert("RGB")
        except Exception as error:  # corrupt files raise anything from SyntaxError to struct.error
            kind = UnusableSample if self.skip_unreadable else UserError
            reason = " ".join(str(error).split())
            hint = "" if self.skip_unreadable else "; mend it or pass --skip_unreadable true"
            raise kind(f"{path}: unreadable image ({reason}), needed by {sample.name}{hint}") from None


def count_image_tokens(processor: Any, image_token_id: int) -> int:
    """How many placeholder tokens the processor makes of one image (LLaVA-1.5: always the same)."""
    blank = Image.new("RGB", (8, 8))
    input_ids = processor(images=[blank], text=[IMAGE_TOKEN], return_tensors="pt")["input_ids"]
    return int((input_ids == image_token_id).sum())


def count_skipped(skipped_file: str | Path) -> int:
    """How many different samples were skipped so far."""
    path = Path(skipped_file)
    if not path.exists():
        return 0
    return len({json.loads(line)["sample"] for line in path.read_text(encoding="utf-8").splitlines()})


class Collator:
    """Pads samples on the right and stacks them.

    Returns a dict of `input_ids`, `attention_mask`, `labels` [B, L] int64, `pixel_values` [images, 3, H, W]
    float32 and `sample` [B] int64, the samples' places in the dataset.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": _pad([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": _pad([row["labels"] for row in rows], IGNORE),
            "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
            "sample": torch.tensor([row["sample"] for row in rows]),
        }


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )
