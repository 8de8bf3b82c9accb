"""What the PyPI package `easy-vqa` states about each of its images: the facts, from its questions alone."""

import json
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from dynllava_plugin.errors import UserError

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_NEGATION = re.compile(r"\b(not|no)\b")


@dataclass
class Tile:
    """One easy-VQA image.

    Attributes
    ----------
    path : Path
        Its 64x64 PNG.
    questions : list of (question, answer)
        As the package ships them.
    color, shape : str or None
        What the questions state; None where no question states it.
    """

    path: Path
    questions: list[tuple[str, str]] = field(default_factory=list)
    color: str | None = None
    shape: str | None = None

    @property
    def known(self) -> bool:
        """Whether both colour and shape are stated."""
        return self.color is not None and self.shape is not None


def find_package() -> Path:
    """Folder of the installed package's data (the package itself shares its name with `train/easy_vqa.py`).

    Raises
    ------
    UserError
        If `easy-vqa` isn't installed or lacks its data.
    """
    try:
        folder = Path(str(distribution("easy-vqa").locate_file("easy_vqa"))) / "data"
    except PackageNotFoundError:
        folder = Path("easy_vqa/data")
    if not (folder / "train" / "questions.json").is_file():
        raise UserError("the easy-VQA images aren't installed: run `pip install easy-vqa==1.0`")
    return folder


def stated_facts(questions: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Colour and shape that question-answer pairs about one single-object image state.

    A pair states them positively if it is a wh-question, or a yes/no question whose answer agrees with its
    polarity ("is there a red shape?" yes; "is no red shape present?" no). The rest only rules a value out;
    with all others ruled out the last one stands.

    Returns
    -------
    color, shape : str or None
        None where not stated.

    Raises
    ------
    ValueError
        If two questions contradict each other.
    """
    found: list[str | None] = []
    for values in (COLORS, SHAPES):
        possible = set(values)
        for question, answer in questions:
            words = set(re.findall(r"[a-z]+", question))
            if answer in values:
                possible &= {answer}
            for value in words & set(values):
                affirmed = answer not in ("yes", "no") or (answer == "yes") != bool(
                    _NEGATION.search(question)
                )
                possible = possible & {value} if affirmed else possible - {value}
        if not possible:
            raise ValueError(f"contradictory questions about one image: {questions[0][0]!r} and others")
        found.append(possible.pop() if len(possible) == 1 else None)
    return found[0], found[1]


def load_tiles(split: str, package: Path | None = None) -> list[Tile]:
    """Return all images of a split with their questions and facts, by image number.

    Parameters
    ----------
    split : {"train", "test"}
    package : Path, optional
        The package's `data` folder; found by itself otherwise.
    """
    folder = (package or find_package()) / split
    tiles: dict[int, Tile] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        tile = tiles.setdefault(number, Tile(folder / "images" / f"{number}.png"))
        tile.questions.append((question, answer))
    for tile in tiles.values():
        tile.color, tile.shape = stated_facts(tile.questions)
    return [tiles[number] for number in sorted(tiles)]
