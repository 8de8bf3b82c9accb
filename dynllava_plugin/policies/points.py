"""What a policy is told at each point where it is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens of a forward call are what; built once and not written again.

    An image is a run of places: images may differ in their number of tokens.
    """

    image_mask: torch.Tensor | None = None  # bool [B, L], image tokens; None where the call has no image
    image_lengths: tuple[int, ...] = ()  # tokens of each of the M images, in the order of their places
    image_rows: tuple[int, ...] = ()  # the sample that each image belongs to
    image_index: torch.Tensor | None = None  # int64 [T], the image tokens in the flattened [B * L] columns
    # bool [B, L], output text, the only text that may be dropped, save `question`; None where the call has none
    output_mask: torch.Tensor | None = None
    output_start: int = 0  # the first column that holds output text in any sample
    # real tokens of each sample, known on the host; None in a step, where no one asks
    counts: tuple[int, ...] | None = None
    ends_real: bool = True  # whether every sample's last column is a real token
    image_seeds: tuple[int, ...] | None = None  # one an image, for policies that use chance
    # [T, 2], what the vision side decided of each image token: 1 where it stays, and its score
    image_marks: torch.Tensor | None = None
    # `image_lengths` before any gate; empty where none has dropped a token
    image_totals: tuple[int, ...] = ()
    # bool [B, L], tokens whose attention the policy looks at; None means the last prompt token's
    watched: torch.Tensor | None = None
    question: torch.Tensor | None = None  # bool [B, L], the last question's text, where it may be dropped

    def before_output(self, columns: torch.Tensor) -> torch.Tensor:
        """Return bool [L] or [B, L], which of the call's `columns` int64 [L] come before each sample's first output token."""
        if self.output_mask is None:
            return columns >= 0
        return columns < torch.where(self.output_mask, columns, len(columns)).amin(1, keepdim=True)

    def image_counts(self) -> list[int]:
        """Return how many image tokens each sample has."""
        assert self.image_mask is not None
        counts = [0] * len(self.image_mask)
        for row, length in zip(self.image_rows, self.image_lengths, strict=True):
            counts[row] += length
        return counts

    def image_groups(self) -> list[tuple[int, list[int]]]:
        """Return (tokens an image, the images that have and had so many), so that each group is one rectangle."""
        groups: dict[tuple[int, int], list[int]] = {}
        for image, both in enumerate(
            zip(self.image_lengths, self.image_totals or self.image_lengths, strict=True)
        ):
            groups.setdefault(both, []).append(image)
        return [(length, images) for (length, _), images in groups.items()]


@dataclass
class Choice:
    """What stays."""

    keep: torch.Tensor  # bool [M, N] of images, or [B, L - output_start] of output text
    score: torch.Tensor | None = None  # how much each speaks for staying, on any scale
    tokens: torch.Tensor | None = None  # [M, N, d], the states that go on where a policy merges tokens
    count: int | None = None  # how many stay of each image, where that is one number known without looking


@dataclass
class Gate:
    """What is known at a gate."""

    hidden: torch.Tensor  # [B, L, d], the states that enter the gate's layer; at layer 0 the embeddings
    valid: torch.Tensor  # bool [B, L], False on padding
    # int64 [B, L], each token's place in its text: the same one alone, in a batch, with and without a cache
    position_ids: torch.Tensor
    layout: TokenLayout
    image_predictor: Any = None  # the checkpoint's, as the other two
    text_predictor: Any = None
    # float32 [B, L], the attention of the last prompt token, or of `TokenLayout.watched`, in a layer of `attention_layers`
    # before this gate, mean over heads and those tokens; None where no one asked
    attention: torch.Tensor | None = None
    layer: int = 0  # the one whose input this is
    entered: torch.Tensor | None = None  # [B, L, d], what entered the layer before; None at layer 0
    prompt_predictor: Any = None
    group: list[int] | None = None  # images in question, all of one number of tokens; None: all

    def of_group(self, images: list[int]) -> Gate:
        """Return the same gate with these images in question."""
        return self if len(images) == len(self.layout.image_lengths) else replace(self, group=images)

    @property
    def images(self) -> Sequence[int]:
        """Return the images in question."""
        return range(len(self.layout.image_lengths)) if self.group is None else self.group

    @property
    def tokens_per_image(self) -> int:
        """Return N of the images in question."""
        return self.layout.image_lengths[self.images[0]] if len(self.images) else 0

    @property
    def whole_image(self) -> int:
        """Return what N was before any gate."""
        totals = self.layout.image_totals
        return totals[self.images[0]] if totals and len(self.images) else self.tokens_per_image

    @property
    def image_seeds(self) -> list[int]:
        """Return a seed for each image in question."""
        assert self.layout.image_seeds is not None
        return [self.layout.image_seeds[image] for image in self.images]

    def of_images(self, values: torch.Tensor) -> torch.Tensor:
        """Return, of values [B, L, ...], those [M, N, ...] of the N tokens of the M images in question."""
        assert self.layout.image_index is not None
        return self.in_question(values.flatten(0, 1)[self.layout.image_index])

    def in_question(self, values: torch.Tensor) -> torch.Tensor:
        """Return, of values [T, ...] of all image tokens, those [M, N, ...] of the images in question."""
        if self.group is None:
            return values.view(-1, self.tokens_per_image, *values.shape[1:])
        parts = values.split(list(self.layout.image_lengths))
        return torch.stack([parts[image] for image in self.group])

    def of_output(self, values: torch.Tensor) -> torch.Tensor:
        """Return, of values [B, L, ...], [B, L - output_start, ...], the columns that may hold output text."""
        return values[:, self.layout.output_start :]

    def question_text(self) -> torch.Tensor:
        """Return bool [B, L], each sample's prompt text behind its last image, else all of its prompt text."""
        assert self.layout.image_mask is not None
        text = ~self.layout.image_mask & self.valid
        columns = torch.arange(text.shape[1], device=text.device)
        text = text & self.layout.before_output(columns)
        behind = text & (columns > torch.where(self.layout.image_mask, columns, -1).amax(1, keepdim=True))
        return torch.where(behind.any(1, keepdim=True), behind, text)

    def question(self) -> torch.Tensor:
        """Return float32 [M, d], for each image the mean state of its sample's `question_text`."""
        chosen = self.question_text()[..., None]
        means = (self.hidden.float() * chosen).sum(1) / chosen.sum(1).clamp(min=1)  # [B, d]
        return means[[self.layout.image_rows[image] for image in self.images]]


@dataclass
class Patches:
    """What is known in the vision tower; queries and keys are before they are split into heads, the class token first."""

    hidden: torch.Tensor  # [M, N, c], the patches that go to the projector
    cls: torch.Tensor  # [M, c], the class token's state of the same layer
    query: torch.Tensor  # [M, 1 + N, c], of the policy's `vision_layer`
    key: torch.Tensor  # [M, 1 + N, c]
    heads: int
    # queries and keys [M, 1 + N, c] of the policy's `earlier_layer`
    earlier: tuple[torch.Tensor, torch.Tensor] | None = None

    def cls_attention(self, heads: int | None = None) -> torch.Tensor:
        """Return float32 [M, N], the class token's attention to the patches, mean over `heads` (default: the tower's)."""
        heads = heads or self.heads
        width = self.query.shape[-1] // heads
        query = self.query[:, 0].unflatten(-1, (heads, width)).float()
        key = self.key.unflatten(-1, (heads, width)).float()
        weights = torch.einsum("mhc,mnhc->mhn", query, key).mul(width**-0.5).softmax(-1)
        return weights[..., 1:].mean(1)

    def received(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return float32 [M, N], the attention that each patch receives, mean over heads and over all rows."""
        query, key = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2).float() for states in (query, key)
        )
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
        return weights.mean((1, 2))[:, 1:]


def descending(score: torch.Tensor) -> torch.Tensor:
    """Return places int64 [..., N] in the order of their scores [..., N], the highest first; of equal ones the first one first."""
    return score.argsort(dim=-1, descending=True, stable=True)


def ranks(score: torch.Tensor) -> torch.Tensor:
    """Return int64 [..., N], the rank of each of the scores [..., N], 0 for the highest."""
    return descending(score).argsort(dim=-1)
