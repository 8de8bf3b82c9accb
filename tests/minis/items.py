"""What is asked in the miniatures: one list of items a benchmark, from which both harnesses' files are made."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES, load_tiles

WH, YES_NO, MIXED = "wh", "yes_no", "mixed"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes
    ----------
    number : int
        Its row.
    image_path : str
        A PNG of the easy-VQA package.
    image_id : str
        Equal for questions about the same image.
    question : str
        Without options or instructions.
    answer : str
        Text, or the right one of `choices`.
    choices : tuple of str
    answers : tuple of str
        Ten people's, where the benchmark has them: not all agree.
    category, hint, source : str
    """

    number: int
    image_path: str
    image_id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    category: str = ""
    hint: str = ""
    source: str = ""

    @property
    def image(self) -> bytes:
        """The PNG file's bytes."""
        return Path(self.image_path).read_bytes()

    @property
    def letter(self) -> str:
        """A, B, ... of the right choice."""
        return chr(ord("A") + self.choices.index(self.answer))

    def options(self) -> dict[str, str]:
        """Letter -> choice."""
        return {chr(ord("A") + place): choice for place, choice in enumerate(self.choices)}

    def to_json(self) -> str:
        """One line, without the image's place on this machine."""
        row = asdict(self)
        del row["image_path"]
        if self.choices:
            row["letter"] = self.letter
        return json.dumps(row)


class Asker:
    """Draws images and questions about them, the same ones at every call.

    Parameters
    ----------
    name : str
        The benchmark: each asks something else.
    """

    def __init__(self, name: str) -> None:
        self.colors, self.shapes = list(COLORS), list(SHAPES)
        self.rng = random.Random(f"mini {name}")
        self._tiles = list(_known_tiles())
        self.rng.shuffle(self._tiles)
        self.items: list[Item] = []

    def ask(
        self, images: int, per_image: int = 1, kind: str = MIXED, choices: bool = False, **common: Any
    ) -> None:
        """Add `per_image` different questions about each of `images` further images."""
        for _ in range(images):
            tile = self._tiles.pop()
            color, shape = tile.color or "", tile.shape or ""
            asked: set[str] = set()
            while len(asked) < per_image:
                wh = self.rng.random() < 0.5 if kind == MIXED else kind == WH
                question, answer, options = self._wh(color, shape) if wh else self._yes_no(color, shape)
                if question in asked:
                    continue
                asked.add(question)
                number = len(self.items)
                self.items.append(
                    Item(
                        number,
                        str(tile.path),
                        f"{int(tile.path.stem):06d}",
                        question,
                        answer,
                        choices=tuple(options) if choices else (),
                        answers=_ten_answers(number, answer, options),
                        **common,
                    )
                )

    def pair(self, images: int, **common: Any) -> None:
        """Add two questions about each of `images` further images, one to be answered yes and one no."""
        for _ in range(images):
            tile = self._tiles.pop()
            color, shape = tile.color or "", tile.shape or ""
            for answer in ("yes", "no"):
                question = self._yes_no(color, shape, answer)[0]
                identity = f"{int(tile.path.stem):06d}"
                self.items.append(Item(len(self.items), str(tile.path), identity, question, answer, **common))  # type: ignore[arg-type]

    def _wh(self, color: str, shape: str) -> tuple[str, str, list[str]]:
        which = self.rng.random() < 0.5
        answer, values = (color, self.colors) if which else (shape, self.shapes)
        wording = (
            ("what color is the shape?", "what is the color of the shape?")
            if which
            else ("what shape is in the image?", "what shape is present?")
        )
        others = self.rng.sample([value for value in values if value != answer], min(3, len(values) - 1))
        options = [answer, *others]
        self.rng.shuffle(options)
        return self.rng.choice(wording), answer, options

    def _yes_no(self, color: str, shape: str, answer: str | None = None) -> tuple[str, str, list[str]]:
        answer = answer or self.rng.choice(("yes", "no"))
        true, values = self.rng.choice(
            ((f"{color} shape", [f"{value} shape" for value in self.colors]), (shape, self.shapes))
        )
        asked = true if answer == "yes" else self.rng.choice([value for value in values if value != true])
        wording = self.rng.choice(("is there a {} in the image?", "does the image contain a {}?"))
        return wording.format(asked), answer, ["yes", "no"]


@cache
def _known_tiles() -> tuple[Any, ...]:
    return tuple(tile for tile in load_tiles("test") if tile.known)


def _ten_answers(number: int, answer: str, options: list[str]) -> tuple[str, ...]:
    """All agree, or three, two or one do: VQA's soft score is 1, 0.9, 0.6 or 0.3 then."""
    agree = (10, 3, 2, 1)[number % 4]
    other = [f"{option} thing" for option in options if option != answer]
    return tuple([answer] * agree + [other[place % len(other)] for place in range(10 - agree)])


def _vqa(images: int, per_image: int) -> Callable[[Asker], None]:
    return lambda asker: asker.ask(images, per_image)


def _choices(images: int, per_image: int = 1) -> Callable[[Asker], None]:
    return lambda asker: asker.ask(images, per_image, choices=True)


def _pope(asker: Asker) -> None:
    for category in ("adversarial", "popular", "random"):
        asker.pair(3, category=category)


def _mme(asker: Asker) -> None:
    for category in ("color", "existence", "existence", "commonsense_reasoning", "color"):
        asker.pair(2, category=category)


def _mmbench(asker: Asker) -> None:
    asker.ask(3, choices=True, category="object_localization", source="coco")
    asker.ask(3, choices=True, category="attribute_recognition", source="coco", hint="look at the shape.")


def _scienceqa(asker: Asker) -> None:
    asker.ask(6, choices=True)
    asker.ask(4, choices=True, hint="look at the shape.")


def _cv_bench(asker: Asker) -> None:
    asker.ask(6, choices=True, source="ADE20K")
    asker.ask(4, choices=True, source="COCO")


def _mmvp(asker: Asker) -> None:
    """Pairs: one question about two images, answered differently."""
    for _ in range(5):
        first = asker._tiles.pop()
        second = next(tile for tile in asker._tiles if tile.shape != first.shape)
        asker._tiles.remove(second)
        for tile in (first, second):
            question, choices = f"is there a {first.shape} in the image?", ("yes", "no")
            answer = "yes" if tile is first else "no"
            identity = f"{int(tile.path.stem):06d}"
            asker.items.append(
                Item(len(asker.items), str(tile.path), identity, question, answer, choices=choices)
            )


def _wild(asker: Asker) -> None:
    for category in ("conv", "detail", "complex"):
        asker.ask(2, kind=WH, category=category)


def _ocrbench(asker: Asker) -> None:
    for category in ("Regular Text Recognition", "Scene Text-centric VQA", "Doc-oriented VQA"):
        asker.ask(3, kind=WH, category=category)


def _mmstar(asker: Asker) -> None:
    for category, detail in (("coarse perception", "image emotion"), ("math", "geometry")):
        asker.ask(5, choices=True, category=category, hint=detail)


def _amber(asker: Asker) -> None:
    for category in ("discriminative-hallucination", "discriminative-attribute-state"):
        asker.pair(3, category=category)


RECIPES: dict[str, Callable[[Asker], None]] = {
    "VQAv2": _vqa(4, 3),
    "VQAv2-test": _vqa(2, 2),
    "GQA": _vqa(4, 3),
    "VizWiz": _vqa(12, 1),
    "VizWiz-test": _vqa(4, 1),
    "SciQA": _scienceqa,
    "TextVQA": _vqa(6, 2),
    "TextVQA-test": _vqa(2, 2),
    "POPE": _pope,
    "MME": _mme,
    "MMBench": _mmbench,
    "SEED": _choices(5, 2),
    "SEED videos": _choices(2),
    "MM-Vet": lambda asker: asker.ask(4, kind=WH),
    "LLaVA-Wild": _wild,
    "MMVP": _mmvp,
    "RealWorldQA": _choices(10),
    "CVBench-2D": _cv_bench,
    "DocVQA": _vqa(4, 2),
    "InfoVQA": _vqa(4, 2),
    "ChartQA": _vqa(5, 2),
    "OCRBench": _ocrbench,
    "AI2D": _choices(10),
    "MMStar": _mmstar,
    "MMMU": _choices(8),
    "MMBench-CN": _mmbench,
    "AMBER": _amber,
}


def items_of(name: str) -> list[Item]:
    """The miniature's questions.

    Raises
    ------
    UserError
        If `easy-vqa` isn't installed.
    """
    asker = Asker(name)
    RECIPES[name](asker)
    return asker.items
