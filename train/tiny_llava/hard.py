"""Hard scenes as training batches: images with each patch's object, questions with where to look."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dynllava_plugin.easy_vqa.hard import SIDE, Asked, Scene, draw_hard_scene, hard_questions, paint
from train.tiny_llava.batches import Batch, Encoder, collate
from train.tiny_llava.gaze import Gaze
from train.tiny_llava.vision import TileSet, VisionBatch, normalize, patch_labels

TOKENS = (SIDE // 16) ** 2


class HardScenes:
    """Endless hard scenes of a tile set, tiles mirrored by chance where `augment`."""

    def __init__(self, tiles: TileSet, seed: int, augment: bool = True) -> None:
        self.tiles, self.rng, self.augment = tiles, random.Random(f"hard {seed}"), augment
        self._pictures = [Image.fromarray(pixels) for pixels in tiles.pixels.numpy()]
        self._masks = [Image.fromarray(mask) for mask in (tiles.masks.numpy() * np.uint8(255))]

    def draw(self, count: int) -> tuple[list[Scene], Tensor, Tensor]:
        """Scenes, their images uint8 [n, S, S, 3] and each pixel's object, int64 [n, S, S], 1, 2, ... from image to image."""
        scenes, images, owners, seen = [], [], [], 0
        for _ in range(count):
            scene = draw_hard_scene(self.tiles.tiles, self.rng)
            pictures = [self._pictures[k] for k in scene.tiles]
            masks = [self._masks[k] for k in scene.tiles]
            for cell in range(len(pictures)):
                if self.augment and self.rng.random() < 0.5:
                    pictures[cell], masks[cell] = (
                        ImageOps.mirror(pictures[cell]),
                        ImageOps.mirror(masks[cell]),
                    )
            owner = np.zeros((SIDE, SIDE), np.int64)
            for number, item in enumerate(scene.items):
                cell = item.row * scene.grid + item.column
                left, top, right, bottom = scene.box(cell)
                small = masks[cell].resize((right - left, bottom - top), Image.Resampling.BOX)
                owner[top:bottom, left:right] = (np.array(small) > 127) * (seen + number + 1)
            seen += len(scene.items)
            scenes.append(scene)
            images.append(np.array(paint(scene, pictures)))
            owners.append(owner)
        return scenes, torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(owners))

    def vision_batches(self, count: int) -> Iterator[VisionBatch]:
        """As `vision.batches`: negatives are background."""
        while True:
            scenes, images, owners = self.draw(count)
            index = torch.tensor(
                [scene.tiles[item.row * scene.grid + item.column] for scene in scenes for item in scene.items]
            )
            yield (
                normalize(images), patch_labels(owners), self.tiles.color[index], self.tiles.shape[index]
            )  # fmt: skip

    def language_batches(
        self, tokenizer: PreTrainedTokenizerFast, count: int, questions: int, seed: int
    ) -> Iterator[Batch]:
        """Batches of `count` scenes with `questions` each, asked one by one or, one scene in four, as a conversation."""
        encoder = Encoder(tokenizer, short_share=0.25, seed=seed, image_tokens=TOKENS)
        while True:
            scenes, images, owners = self.draw(count)
            asked = [hard_questions(scene, questions, self.rng) for scene in scenes]
            turns = [[(one.question, one.answer) for one in questions] for questions in asked]
            samples = [(one, self.rng.random() < 0.75) for one in turns]
            batch = collate(encoder, samples, normalize(images))
            batch.gaze = find_hard_gaze(batch.labels, asked, scenes, patch_labels(owners))
            yield batch


def find_hard_gaze(
    labels: Tensor, asked: list[list[Asked]], scenes: list[Scene], patches: Tensor
) -> list[Gaze]:
    """Where four heads should look at the start of each answer: two at the first and the second object, two more at the first
    token where there is none.

    A count is read from how much of the last two heads' attention stays on the first token: 1 / (n + 1) of it for n objects.

    Parameters
    ----------
    labels : int64 [B, T]
        -100 outside answers.
    patches : int64 [B, N]
        Each patch's object, numbered from scene to scene, negative on background.
    """
    before = torch.nn.functional.pad(labels, (1, 0), value=-100)[:, :-1]
    starts = (labels != -100) & (before == -100)
    gazes = []
    for head in range(4):
        rows, columns, goals = [], [], []
        first = 0
        for row, questions in enumerate(asked):
            shows = [patches[row] == first + k for k in range(len(scenes[row].items))]
            first += len(shows)
            for column, one in zip(starts[row].nonzero()[:, 0].tolist(), questions, strict=True):
                about = [k for k in one.about[head % 2] if shows[k].any()]
                match, counted = head >= 2, one.kind in ("count", "comparison")
                goal = torch.zeros(1 + patches.shape[1])
                for k in about:
                    goal[1:] += shows[k] / shows[k].sum()
                goal[0] = float(match and (counted or not about))
                if goal.sum() > 0:
                    rows.append(row)
                    columns.append(column - 1)
                    goals.append(goal / goal.sum())
        if rows:
            heads = slice(head, head + 1)
            gazes.append(Gaze(heads, torch.tensor(rows), torch.tensor(columns), torch.stack(goals)))
    return gazes
