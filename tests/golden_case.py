"""Reads the golden cases: what the published Dynamic-LLaVA code computes on three tiny models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from dynllava_plugin.model.checkpoints import load_without_processor

GOLDEN = Path(__file__).parent / "golden"
CASES = ("mha", "gqa", "image-only")
IMAGE_PLACE = -200


@dataclass
class GoldenCase:
    name: str
    settings: dict
    grad_norms: dict[str, float]
    tensors: dict[str, torch.Tensor]
    model: torch.nn.Module

    @property
    def vocab(self) -> int:
        return self.settings["vocab"]

    @property
    def image_tokens(self) -> int:
        return self.tensors["image_features"].shape[1]

    def expand(self, ids: torch.Tensor, fill: int | None = None) -> torch.Tensor:
        """[B, L] with image places -> [B, L - 1 + N], each place repeated (or `fill`ed) N times."""
        rows = []
        for row in ids:
            place = int((row == IMAGE_PLACE).nonzero()[0])
            images = torch.full(
                (self.image_tokens,), self.model.config.image_token_id if fill is None else fill
            )
            rows.append(torch.cat([row[:place], images, row[place + 1 :]]))
        return torch.stack(rows)

    def beside(self, values: torch.Tensor, ids: torch.Tensor, fill: int) -> torch.Tensor:
        """Labels or a mask [B, L] beside `ids`, with N times `fill` in the image's place."""
        rows = []
        for row, id_row in zip(values, ids, strict=True):
            place = int((id_row == IMAGE_PLACE).nonzero()[0])
            rows.append(torch.cat([row[:place], torch.full((self.image_tokens,), fill), row[place + 1 :]]))
        return torch.stack(rows)

    @property
    def prompt(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.expand(self.tensors["prompt_ids"]),
            "pixel_values": self.tensors["pixel_values"],
        }


def load_case(name: str) -> GoldenCase:
    description = json.loads((GOLDEN / name / "golden.json").read_text())
    return GoldenCase(
        name=name,
        settings=description["case"],
        grad_norms=description["grad_norms"],
        tensors=load_file(GOLDEN / name / "golden.safetensors"),
        model=load_without_processor(GOLDEN / name / "checkpoint"),
    )
