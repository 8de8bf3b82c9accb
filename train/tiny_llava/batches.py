"""Stage 2's batches: one image a sequence, many questions, each seeing the image but not the other questions.

Questions that can read each other's answers learn to copy them instead of looking. So most sequences hold the
prefix (system prompt, image) once and then one block a question, laid out exactly as a prompt of its own: it
attends to the prefix and itself, and its positions continue the prefix. A part are ordinary conversations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES
from dynllava_plugin.easy_vqa.scenes import DESCRIPTIONS, Fact, describe, scene_questions
from dynllava_plugin.easy_vqa.writing import SHORT_ANSWER
from dynllava_plugin.model.prompts import IMAGE_TOKEN, vicuna_v1
from train.tiny_llava.gaze import IMAGE_TOKENS, Gaze, find_gaze
from train.tiny_llava.vision import TileSet, enlarge, join_tiles, normalize, object_patches

TENSORS = ("ids", "positions", "labels", "block", "pixels")
Turn = tuple[str, str]


@dataclass
class Batch:
    """Sequences padded on the right.

    Attributes
    ----------
    ids, positions : int64 [B, T]
    labels : int64 [B, T]
        -100 outside answers.
    block : int64 [B, T]
        0 prefix (or an ordinary conversation), k the k-th question, -1 padding.
    pixels : float [B, 3, S, S]
    image_start : int
        The column of every row's first image token.
    gaze : list of Gaze
        Where answers are to be found, for the gaze loss.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    block: Tensor
    pixels: Tensor
    image_start: int
    gaze: list[Gaze] = field(default_factory=list)

    def mask(self) -> Tensor:
        """bool [B, 1, T, T]: who attends to whom."""
        row, column = self.block[:, :, None], self.block[:, None, :]
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        return (((column == 0) | (row == column)) & causal)[:, None]

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device`."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        gaze = [Gaze(g.heads, *(t.to(device) for t in (g.rows, g.columns, g.goals))) for g in self.gaze]
        return replace(self, **moved, gaze=gaze)


class Encoder:
    """Turns (questions, answers) about one image into ids, labels, positions and blocks.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    short_share : float
        How many of the short questions end with the prompt for short answers, as the evaluation's do. It makes up
        half of a question, so training leaves it out of most.
    seed : int
        Which ones.
    image_tokens : int
        Of an image.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        short_share: float = 1.0,
        seed: int = 0,
        image_tokens: int = IMAGE_TOKENS,
    ) -> None:
        self.tokenizer, self.image_tokens = tokenizer, image_tokens
        self.short_share, self.rng = short_share, random.Random(seed)
        whole = vicuna_v1([(f"{IMAGE_TOKEN}\n", None)])
        self.head, rest = whole.split(IMAGE_TOKEN)
        self.tail = rest.removeprefix("\n")
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.prefix = [tokenizer.bos_token_id, *self.pieces(self.head)]
        self.image_start = len(self.prefix)
        self.prefix += [self.image_id] * image_tokens + self.pieces("\n")

    def pieces(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def __call__(
        self, turns: list[Turn], separate: bool
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """ids, labels, positions, blocks of one sequence; `separate`: a block per question."""
        ids, labels = list(self.prefix), [-100] * len(self.prefix)
        positions, blocks = list(range(len(ids))), [0] * len(ids)
        for number, (question, answer) in enumerate(turns):
            first = separate or number == 0
            wanted = first and question not in DESCRIPTIONS and self.rng.random() < self.short_share
            short = SHORT_ANSWER if wanted else ""
            asked = self.pieces(("" if first else "USER: ") + question + short + self.tail)
            said = self.pieces(f" {answer}</s>")
            start = len(self.prefix) if separate else len(ids)
            ids += asked + said
            labels += [-100] * len(asked) + said
            positions += range(start, start + len(asked) + len(said))
            blocks += [number + 1 if separate else 0] * (len(asked) + len(said))
        return ids, labels, positions, blocks


def collate(encoder: Encoder, samples: list[tuple[list[Turn], bool]], pixels: Tensor) -> Batch:
    """Pad encoded samples to one length on the right (padding is a block of its own, without labels)."""
    rows = [encoder(turns, separate) for turns, separate in samples]
    longest = max(len(row[0]) for row in rows)
    padded = []
    for column, filler in enumerate((encoder.tokenizer.pad_token_id, -100, 0, -1)):
        padded.append(torch.tensor([row[column] + [filler] * (longest - len(row[column])) for row in rows]))
    ids, labels, positions, block = padded
    return Batch(ids, positions, labels, block, pixels, encoder.image_start)


def training_batches(
    tiles: TileSet, tokenizer: PreTrainedTokenizerFast, scenes: int, singles: int, questions: int, seed: int
) -> Iterator[Batch]:
    """Endless batches: of the scenes one in eight is only described and one in eight an ordinary conversation."""
    encoder = Encoder(tokenizer, short_share=0.25, seed=seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(tiles), (4 * scenes + singles,), generator=generator)
        facts: list[Fact] = [(COLORS[tiles.color[i]], SHAPES[tiles.shape[i]]) for i in index.tolist()]
        pixels, masks = tiles.shifted(index, generator)
        images = torch.cat([join_tiles(pixels[: 4 * scenes]).float(), enlarge(pixels[4 * scenes :])])
        samples: list[tuple[list[Turn], bool]] = []
        asked: list[list[str | None]] = []  # questions whose answer is found by one look
        shown = [facts[4 * k : 4 * k + 4] for k in range(scenes)] + [[fact] for fact in facts[4 * scenes :]]
        for four in shown[:scenes]:
            kind = rng.random()
            prompts = rng.sample(list(DESCRIPTIONS), 3)
            if kind < 1 / 8:
                samples.append(([(p, describe(four, p)) for p in prompts], True))
                asked.append([None] * len(prompts))
            elif kind < 1 / 4:
                turns = scene_questions(four, 8, rng)
                samples.append(([*turns, (prompts[0], describe(four, prompts[0]))], False))
                asked.append([*(question for question, _ in turns), None])
            else:
                samples.append((scene_questions(four, questions, rng), True))
                asked.append([question for question, _ in samples[-1][0]])
        for i in index[4 * scenes :].tolist():
            own = tiles.tiles[i].questions
            samples.append((rng.sample(own, min(16, len(own))), rng.random() < 0.8))
            asked.append([question for question, _ in samples[-1][0]])
        batch = collate(encoder, samples, normalize(images))
        batch.gaze = find_gaze(batch.labels, asked, shown, object_patches(masks, scenes))
        yield batch
