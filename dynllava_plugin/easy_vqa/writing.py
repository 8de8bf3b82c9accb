"""easy-VQA's images as LLaVA conversations for training and as four test sets."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dynllava_plugin.easy_vqa.facts import Tile, load_tiles
from dynllava_plugin.easy_vqa.hard import draw_hard_scene, hard_questions, paint
from dynllava_plugin.easy_vqa.scenes import DESCRIBE, DESCRIPTIONS, Fact, describe, scene_questions
from dynllava_plugin.files import write_text
from dynllava_plugin.images import open_image

TEST_SCENES, TEST_DESCRIPTIONS, SEED = 1000, 200, 0  # of the benchmarks
HARD_TEST_SCENES, HARD_TEST_QUESTIONS = 400, 5
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # LLaVA's prompt for short answers


def conversation(name: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """Return one sample in LLaVA's format: `<image>` opens the first turn, the short-answer prompt ends it."""
    rounds: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(turns):
        short = SHORT_ANSWER if number == 0 and question not in DESCRIPTIONS else ""
        rounds.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + question + short})
        rounds.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": rounds}


def tile_scene(tiles: list[Tile]) -> Image.Image:
    """Four 64x64 tiles as one 128x128 image: top left, top right, bottom left, bottom right."""
    scene = Image.new("RGB", (128, 128))
    for k, tile in enumerate(tiles):
        scene.paste(open_image(tile.path), (64 * (k % 2), 64 * (k // 2)))
    return scene


def draw_scene(tiles: list[Tile], rng: random.Random) -> tuple[list[Tile], list[Fact]]:
    """Four different tiles and their facts; only tiles whose colour and shape are known take part."""
    chosen = rng.sample(tiles, 4)
    return chosen, [(tile.color or "", tile.shape or "") for tile in chosen]


def write_train(folder: Path, singles: int, scenes: int, questions: int, described: float, seed: int) -> int:
    """Write the training mix; returns how many train images state too little to take part in scenes."""
    tiles = load_tiles("train")
    rng = random.Random(f"train {seed}")
    images = folder / "images" / "train"
    images.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in tqdm(
        rng.sample(range(len(tiles)), min(singles, len(tiles))), desc="train images", unit="image"
    ):
        tile, name = tiles[number], f"single_{number:05d}.png"
        shutil.copyfile(tile.path, images / name)
        turns = rng.sample(tile.questions, len(tile.questions))
        samples.append(conversation(f"easy_vqa_train_{number:05d}", f"images/train/{name}", turns))
    known = [tile for tile in tiles if tile.known]
    for number in tqdm(range(scenes), desc="train scenes", unit="scene"):
        chosen, facts = draw_scene(known, rng)
        name = f"scene_{number:05d}.png"
        tile_scene(chosen).save(images / name)
        turns = scene_questions(facts, questions, rng)
        if rng.random() < described:
            # Half of them the test's prompt; the long answer comes last, where output tokens are sparsified.
            prompt = DESCRIBE if rng.random() < 0.5 else rng.choice(list(DESCRIPTIONS))
            turns = [*turns[: len(turns) // 2], (prompt, describe(facts, prompt))]
        samples.append(conversation(f"easy_vqa_scene_train_{number:05d}", f"images/train/{name}", turns))
    rng.shuffle(samples)
    write_text(folder / "train.json", json.dumps(samples, indent=1) + "\n")
    return len(tiles) - len(known)


def write_hard_train(folder: Path, scenes: int, questions: int, seed: int) -> None:
    """Write `hard_train.json`, a conversation about each of `scenes` hard scenes of train images."""
    known = [tile for tile in load_tiles("train") if tile.known]
    rng = random.Random(f"hard train {seed}")
    samples = []
    for number in tqdm(range(scenes), desc="hard train scenes", unit="scene"):
        image, turns = _draw_hard(known, folder, "train", number, questions, rng)
        pairs = [(turn["question"], turn["answer"]) for turn in turns]
        samples.append(conversation(f"easy_vqa_hard_train_{number:05d}", image, pairs))
    write_text(folder / "hard_train.json", json.dumps(samples, indent=1) + "\n")


def _draw_hard(
    known: list[Tile], folder: Path, split: str, number: int, questions: int, rng: random.Random
) -> tuple[str, list[dict[str, str]]]:
    """A hard scene's image, written, and its questions."""
    scene = draw_hard_scene(known, rng)
    pictures = [open_image(known[k].path) for k in scene.tiles]
    name = f"images/{split}/hard_{number:05d}.png"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    paint(scene, pictures).save(folder / name)
    asked = hard_questions(scene, questions, rng)
    return name, [{"question": one.question, "answer": one.answer, "kind": one.kind} for one in asked]


def write_test(
    folder: Path,
    scenes: int = TEST_SCENES,
    questions: int = 4,
    described: int = TEST_DESCRIPTIONS,
    seed: int = SEED,
    hard_scenes: int = HARD_TEST_SCENES,
) -> int:
    """Write the four test sets; returns how many test images state too little to take part in scenes."""
    tiles = load_tiles("test")
    rng = random.Random(f"test {seed}")
    images = folder / "images" / "test"
    images.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {"easy_vqa": [], "easy_vqa_scenes": [], "easy_vqa_describe": []}

    def add(benchmark: str, image: str, question: str, answer: str) -> None:
        number = len(rows[benchmark])
        row = {"id": f"{benchmark}_{number:05d}", "image": image, "question": question, "answer": answer}
        rows[benchmark].append(row)

    for number, tile in enumerate(tqdm(tiles, desc="test images", unit="image")):
        name = f"single_{number:05d}.png"
        shutil.copyfile(tile.path, images / name)
        for question, answer in tile.questions:
            add("easy_vqa", f"images/test/{name}", question, answer)
    known = [tile for tile in tiles if tile.known]
    for number in tqdm(range(scenes), desc="test scenes", unit="scene"):
        chosen, facts = draw_scene(known, rng)
        name = f"scene_{number:05d}.png"
        tile_scene(chosen).save(images / name)
        for question, answer in scene_questions(facts, questions, rng):
            add("easy_vqa_scenes", f"images/test/{name}", question, answer)
        if number < described:
            add("easy_vqa_describe", f"images/test/{name}", DESCRIBE, describe(facts))
    rng = random.Random(f"hard test {seed}")
    rows["easy_vqa_hard"] = [
        {"id": f"easy_vqa_hard_{number:05d}_{turn}", "image": image, **asked}
        for number in tqdm(range(hard_scenes), desc="hard test scenes", unit="scene")
        for image, turns in [_draw_hard(known, folder, "test", number, HARD_TEST_QUESTIONS, rng)]
        for turn, asked in enumerate(turns)
    ]
    for benchmark, content in rows.items():
        write_text(folder / f"{benchmark}_test.jsonl", "".join(json.dumps(row) + "\n" for row in content))
    return len(tiles) - len(known)
