"""What is trained on what: the bundled tiny LLaVA from scratch, and one for hard scenes that starts from it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dynllava_plugin.easy_vqa.facts import Tile
from dynllava_plugin.easy_vqa.hard import SIDE, draw_hard_scene, hard_questions
from dynllava_plugin.model.prompts import vicuna_v1
from train.tiny_llava.batches import Batch, training_batches
from train.tiny_llava.hard import HardScenes
from train.tiny_llava.language import build_model
from train.tiny_llava.tokenizer import build_tokenizer
from train.tiny_llava.vision import TileSet, VisionBatch, batches, vision_config
from train.tiny_llava.warm_start import start_language, start_tower

BUNDLED = Path(__file__).resolve().parents[2] / "dynllava_plugin" / "assets" / "tiny_llava"


@dataclass(frozen=True)
class Recipe:
    """One training, stage by stage; a stage's streams are endless.

    Attributes
    ----------
    side : int
        Pixels of an image.
    place_weight : float
        Of a patch's row and column in stage 1's loss.
    halves : bool
        Whether places are halves of the image (`language.align_projector`).
    steps : (int, int, int)
        Default steps of the vision tower, the alignment and the language model.
    benchmarks : tuple of str
        What the checkpoint is tested on.
    tower, tokenizer, model : callables
        What stage 1 and stage 2 start from.
    vision, alignment, language : callables
        A stage's batches: of train tiles and a seed; stage 2's of a tokenizer too.
    unseen : callable
        Named batches of test tiles for stage 1.
    """

    side: int
    place_weight: float
    halves: bool
    steps: tuple[int, int, int]
    benchmarks: tuple[str, ...]
    tower: Callable[[], CLIPVisionModel]
    tokenizer: Callable[[list[Tile]], PreTrainedTokenizerFast]
    model: Callable[[CLIPVisionModel, PreTrainedTokenizerFast, int, int], LlavaForConditionalGeneration]
    vision: Callable[[TileSet, int], Iterator[VisionBatch]]
    unseen: Callable[[TileSet], dict[str, Iterator[VisionBatch]]]
    alignment: Callable[[TileSet, int], Iterator[VisionBatch]]
    language: Callable[[TileSet, PreTrainedTokenizerFast, int], Iterator[Batch]]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hard_tower() -> CLIPVisionModel:
    tower = CLIPVisionModel(vision_config(image_size=SIDE))
    start_tower(tower, _bundled().model.vision_tower)
    return tower


def _hard_tokenizer(tiles: list[Tile]) -> PreTrainedTokenizerFast:
    rng, known = random.Random(0), [tile for tile in tiles if tile.known]
    scenes = [draw_hard_scene(known, rng) for _ in range(300)]
    asked = [hard_questions(scene, 12, rng) for scene in scenes]
    texts = [vicuna_v1([(one.question, one.answer) for one in questions]) for questions in asked]
    return build_tokenizer(tiles, [*texts, *" 0 1 2 3 4 5".split(" ")])


def _hard_model(
    tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast, layers: int, width: int
) -> LlavaForConditionalGeneration:
    model = build_model(tower, tokenizer, layers, width)
    start_language(model, tokenizer, _bundled(), AutoProcessor.from_pretrained(BUNDLED).tokenizer)
    return model


def _bundled() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(BUNDLED)


EASY = Recipe(
    side=128, place_weight=0.1, halves=True, steps=(1500, 400, 2000), benchmarks=("easy_vqa", "easy_vqa_scenes", "easy_vqa_describe"),
    tower=lambda: CLIPVisionModel(vision_config()), tokenizer=build_tokenizer, model=build_model,
    vision=lambda tiles, seed: batches(tiles, 24, 12, _seeded(seed)),
    unseen=lambda tiles: {
        "in scenes": batches(tiles, 50, 0, _seeded(1), augment=False),
        "alone": batches(tiles, 0, 50, _seeded(1), augment=False),
    },
    alignment=lambda tiles, seed: batches(tiles, 12, 4, _seeded(seed)),
    language=lambda tiles, tokenizer, seed: training_batches(tiles, tokenizer, 7, 3, 18, seed),
)  # fmt: skip
HARD = Recipe(
    # With 0.1 the objects' patches don't tell their place (35% of columns right, read by an MLP), with 1 they do (99%).
    side=SIDE, place_weight=1.0, halves=False, steps=(1000, 300, 1600), benchmarks=("easy_vqa_hard",),
    tower=_hard_tower, tokenizer=_hard_tokenizer, model=_hard_model,
    vision=lambda tiles, seed: HardScenes(tiles, seed).vision_batches(36),
    unseen=lambda tiles: {"in hard scenes": HardScenes(tiles, 1, augment=False).vision_batches(40)},
    alignment=lambda tiles, seed: HardScenes(tiles, seed).vision_batches(16),
    language=lambda tiles, tokenizer, seed: HardScenes(tiles, seed).language_batches(tokenizer, 8, 12, seed),
)  # fmt: skip
RECIPES = {"easy": EASY, "hard": HARD}
