"""A checkpoint in place of random weights, asked about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynllava_plugin.bench.subject import Prompts, Subject
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.images import load_image
from dynllava_plugin.flops import DecoderShape
from dynllava_plugin.policies import Policy

QUESTION = "Describe the image in detail."


def pictures_in(folder: Path) -> list[Path]:
    """Return a folder's pictures by name; `UserError` where there is none."""
    from PIL import Image

    known = Image.registered_extensions()
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in known)
    if not files:
        raise UserError(f"--images {folder}: no picture in it; name a folder of some")
    return files


class PicturePrompts(Prompts):
    """The same of a checkpoint's questions about pictures; its own predictors decide."""

    def __init__(self, subject: Subject, batch: int, new_tokens: int, mixed: bool) -> None:
        assert subject.loaded is not None
        self.subject, self.batch = subject, batch
        found = {
            name: values.to(subject.device) for name, values in subject.loaded.inputs(batch, mixed).items()
        }
        self.ids, self.mask = found.pop("input_ids"), found.pop("attention_mask")
        self.lengths, self.width = self.mask.sum(1).tolist(), self.ids.shape[1]
        self.mixed = min(self.lengths) < self.width
        generator = torch.Generator(device=subject.device).manual_seed(batch)
        size = batch, max(new_tokens, 1)
        self.answers = torch.randint(3, subject.shape.vocab, size, generator=generator, device=subject.device)
        self._pixels = {
            name: values.to(subject.dtype) if values.is_floating_point() else values
            for name, values in found.items()
        }
        self._encoded: dict[Policy, dict[str, Any]] = {}

    @property
    def more(self) -> dict[str, Any]:
        """Return sizes and grids."""
        return {name: values for name, values in self._pixels.items() if name != "pixel_values"}

    @property
    def encoded(self) -> dict[str, Any]:
        """Return the images' features, encoded once for each policy: the vision tower costs every one the same."""
        model = self.subject.model
        policy = model.model.language_model.policy
        if policy not in self._encoded:
            with torch.no_grad():
                self._encoded[policy] = {"image": model.encode_images(self._pixels)}
        return self._encoded[policy]

    def calibrate(self) -> float:
        """Nothing is set."""
        return self.subject.text_keep_rate


class Loaded:
    """A checkpoint and the pictures that it is asked about.

    Raises
    ------
    UserError
        As `load_model`'s, and for a folder without pictures.
    """

    prompts = PicturePrompts

    def __init__(self, pretrained: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from dynllava_plugin import load_model

        files = pictures_in(folder)
        self.model, self.processor = load_model(pretrained, device=device, dtype=dtype, mode="full")
        self.model.eval().requires_grad_(False)
        self.files, self.shape = files, DecoderShape.of(self.model.config.text_config)

    def tokens(self) -> tuple[int, int]:
        """Return how many image and text tokens a prompt has, on average over one of each picture (16 at most)."""
        batch = min(len(self.files), 16)
        ids, mask = (self.inputs(batch, mixed=False)[name] for name in ("input_ids", "attention_mask"))
        images = round(int((ids == self.model.config.image_token_id).sum()) / batch)
        return images, round(int(mask.sum()) / batch) - images

    def inputs(self, batch: int, mixed: bool) -> dict[str, Any]:
        """Return the processor's tensors for `batch` questions, each about the next picture; `mixed`: of other lengths."""
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": self._question(row, mixed)}],
                }
            ]
            for row in range(batch)
        ]
        texts = [
            self.processor.apply_chat_template(turns, add_generation_prompt=True) for turns in conversations
        ]
        images = [[load_image(self.files[row % len(self.files)], "--images")] for row in range(batch)]
        return dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))

    def _question(self, row: int, mixed: bool) -> str:
        return " ".join([QUESTION] * (1 + (row % 3 if mixed else 0)))
