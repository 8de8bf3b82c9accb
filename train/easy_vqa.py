"""Turn the PyPI package `easy-vqa` into LLaVA's training format and three test sets; see `--help`.

Writes, under `--output_dir`: `images/{train,test}/*.png`; `train.json`, multi-turn conversations; and
`easy_vqa_test.jsonl` (the package's own test questions), `easy_vqa_scenes_test.jsonl` (questions about 2x2
scenes), `easy_vqa_describe_test.jsonl` (long answers). Test rows: id, image (relative to the
folder), question, answer.
Train scenes are tiled from train images only, test scenes from test images only.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

if (
    __name__ == "__main__"
):  # run as a file: find `train` and, under the name `easy_vqa`, nothing but the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image
from tqdm import tqdm

from train.easy_vqa_facts import Tile, load_tiles
from train.easy_vqa_scenes import DESCRIBE, DESCRIPTIONS, Fact, describe, scene_questions

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # LLaVA's prompt for short answers


def conversation(name: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """One sample in LLaVA's format: `<image>` opens the first turn, the short-answer prompt ends it."""
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
        with Image.open(tile.path) as image:
            scene.paste(image.convert("RGB"), (64 * (k % 2), 64 * (k // 2)))
    return scene


def draw_scene(tiles: list[Tile], rng: random.Random) -> tuple[list[Tile], list[Fact]]:
    """Four different tiles and their facts; only tiles whose colour and shape are known take part."""
    chosen = rng.sample(tiles, 4)
    return chosen, [(tile.color or "", tile.shape or "") for tile in chosen]


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


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
    replace_text(folder / "train.json", json.dumps(samples, indent=1) + "\n")
    return len(tiles) - len(known)


def write_test(folder: Path, scenes: int, questions: int, described: int, seed: int) -> int:
    """Write the three test sets; returns how many test images state too little to take part in scenes."""
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
    for benchmark, content in rows.items():
        replace_text(folder / f"{benchmark}_test.jsonl", "".join(json.dumps(row) + "\n" for row in content))
    return len(tiles) - len(known)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; out-of-range values end the program with one line."""
    parser = argparse.ArgumentParser(
        description="easy-VQA's images as LLaVA conversations for training and three test sets.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="which scenes and questions are drawn")
    parser.add_argument(
        "--singles", type=int, default=1000, help="train conversations about one image (4,000 at most)"
    )
    parser.add_argument("--scenes", type=int, default=2000, help="train conversations about a scene")
    parser.add_argument("--questions_per_scene", type=int, default=12, help="of a train scene (1 to 24)")
    parser.add_argument(
        "--described", type=float, default=1 / 3, help="share of train scenes with a long last answer"
    )
    parser.add_argument("--test_scenes", type=int, default=1000, help="each with four questions")
    parser.add_argument("--test_descriptions", type=int, default=200, help="long test answers, one a scene")
    args = parser.parse_args(arguments)
    for flag in ("singles", "scenes", "test_scenes", "test_descriptions"):
        if getattr(args, flag) < 0:
            raise ValueError(f"--{flag} is {getattr(args, flag)}: give 0 or more")
    if args.singles + args.scenes == 0:
        raise ValueError("--singles and --scenes are both 0: nothing to train on")
    if not 1 <= args.questions_per_scene <= 24:
        raise ValueError(f"--questions_per_scene is {args.questions_per_scene}: give 1 to 24")
    if not 0 <= args.described <= 1:
        raise ValueError(f"--described is {args.described}: give a share from 0 to 1")
    if args.test_descriptions > args.test_scenes:
        raise ValueError(f"--test_descriptions {args.test_descriptions} needs as many --test_scenes")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the conversion; returns the exit status."""
    try:
        args = parse_arguments(arguments)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        left_out = write_test(args.output_dir, args.test_scenes, 4, args.test_descriptions, args.seed)
        print(f"test: {left_out} images whose colour or shape no question states stay out of the scenes")
        left_out = write_train(
            args.output_dir, args.singles, args.scenes, args.questions_per_scene, args.described, args.seed
        )
        print(f"train: {left_out} images whose colour or shape no question states stay out of the scenes")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
