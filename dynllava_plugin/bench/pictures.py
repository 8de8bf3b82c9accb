"""A checkpoint in place of random weights, asked about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynllava_plugin import load_model
from dynllava_plugin.bench.subject import Prompts, Subject
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape
from dynllava_plugin.images import open_image
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


class Loaded:
    """A checkpoint and the pictures that it is asked about.

    Raises
    ------
    UserError
        As `load_model`'s, and for a folder without pictures.
    """

    def __init__(self, pretrained: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.files = pictures_in(folder)
        self.model, self.processor = load_model(pretrained, device=device, dtype=dtype, mode="full")
        self.model.eval().requires_grad_(False)
        self.shape = DecoderShape.of(self.model.config.text_config)

    def prompts(self, subject: Subject, batch: int, new_tokens: int, mixed: bool) -> Prompts:
        """Return `batch` questions, each about the next picture; the checkpoint's own predictors decide."""
        found = {name: value.to(subject.device) for name, value in self.inputs(batch, mixed).items()}
        ids, mask = found.pop("input_ids"), found.pop("attention_mask")
        pixels = {
            name: value.to(subject.dtype) if value.is_floating_point() else value
            for name, value in found.items()
        }
        encoded: dict[Policy, dict[str, Any]] = {}

        def encode() -> dict[str, Any]:
            # Once for each policy: the vision tower costs every one the same.
            policy = self.model.model.language_model.policy
            if policy not in encoded:
                with torch.no_grad():
                    encoded[policy] = {"image": self.model.encode("image", pixels)}
            return encoded[policy]

        more = {name: value for name, value in pixels.items() if name != "pixel_values"}
        return Prompts(subject, ids, mask, encode, new_tokens, more)

    def tokens(self) -> tuple[int, int]:
        """Return how many image and text tokens a prompt has, on average over one of each picture (16 at most)."""
        batch = min(len(self.files), 16)
        found = self.inputs(batch, mixed=False)
        images = round(int((found["input_ids"] == self.model.config.image_token_id).sum()) / batch)
        return images, round(int(found["attention_mask"].sum()) / batch) - images

    def inputs(self, batch: int, mixed: bool) -> dict[str, Any]:
        """Return the processor's tensors for `batch` questions, each about the next picture; `mixed`: of other lengths."""
        texts = []
        for row in range(batch):
            question = " ".join([QUESTION] * (1 + (row % 3 if mixed else 0)))
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            texts.append(self.processor.apply_chat_template([turn], add_generation_prompt=True))
        images = [[open_image(self.files[row % len(self.files)], "--images")] for row in range(batch)]
        return dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))
