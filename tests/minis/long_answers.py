"""Miniatures of LVIS-Instruct4V, ShareGPT4V and the training mixture, and the generation sets built from them."""

from __future__ import annotations

import io
import json
import random
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from dynllava_plugin.cli import main
from dynllava_plugin.easy_vqa.facts import load_tiles
from dynllava_plugin.easy_vqa.scenes import DESCRIPTIONS, describe, scene_questions
from dynllava_plugin.easy_vqa.writing import draw_scene, tile_scene
from dynllava_plugin.files import write_text

SIZE = 4  # samples of each set
_SCENES = 14


def write_generation_sets(folder: Path) -> None:
    """Write scenes, the three JSON files in LLaVA's format, and what `build-lvis` selects from them.

    Some entries are broken, some are in the mixture, some are too short: the rules have something to do.
    """
    rng = random.Random("mini long answers")
    tiles = [tile for tile in load_tiles("test") if tile.known]
    images = folder / "images"
    (images / "coco" / "train2017").mkdir(parents=True)
    instruct: list[Any] = [{"id": "broken", "image": "coco/train2017/none.png"}, "not an object"]
    captions: list[Any] = []
    names = []
    for number in range(_SCENES):
        chosen, facts = draw_scene(tiles, rng)
        name = f"coco/train2017/{number:012d}.png"
        names.append(name)
        tile_scene(chosen).save(images / name)
        texts = {prompt: describe(facts, prompt) for prompt in DESCRIPTIONS}
        whole = " ".join(texts.values())  # about 150 words
        opening = next(iter(texts))
        instruct.append(_entry(f"single_{number}", name, [(opening, whole)]))
        instruct.append(_entry(f"short_{number}", name, [(opening, texts[opening])]))
        asked = scene_questions(facts, 6, rng)
        rounds = [*texts.items(), *asked, *((f"{prompt} Once more.", text) for prompt, text in texts.items())]
        instruct.append(_entry(f"multi_{number}", name, rounds))
        captions.append(_entry(f"caption_{number}", name, [(opening, f"{whole} {whole}")]))
    mixture = [{"id": "text only", "conversations": []}]
    mixture += [{"id": name, "image": name, "conversations": []} for name in names[:3]]
    files = {"instruct": instruct, "sharegpt4v": captions, "mixture": mixture}
    for stem, content in files.items():
        write_text(folder / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    flags = {
        "--instruct": "instruct.json",
        "--sharegpt4v": "sharegpt4v.json",
        "--exclude": "mixture.json",
        "--images": images,
    }
    typed = [part for flag, name in flags.items() for part in (flag, str(folder / name))]
    with redirect_stdout(io.StringIO()):
        assert main(["build-lvis", *typed, "--output", str(folder), "--size", str(SIZE)]) == 0


def _entry(name: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages = []
    for place, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": ("<image>\n" if place == 0 else "") + question})
        messages.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": messages}
