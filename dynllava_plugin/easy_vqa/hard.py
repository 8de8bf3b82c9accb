"""Hard scenes: grids of 3x3 to 5x5 easy-VQA images, a few of them asked about and the others shown as negatives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from dynllava_plugin.easy_vqa.facts import SHAPES, Tile

SIDE = 160  # pixels of a scene
GRIDS = (3, 4, 5)
KINDS = ("attribute", "position", "relation", "count", "comparison", "negation")


@dataclass(frozen=True)
class Item:
    """One shape of a scene that questions are about: what it is and in which cell it stands."""

    color: str
    shape: str
    row: int
    column: int

    @property
    def name(self) -> str:
        """Return what questions call it, e.g. "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A grid of `grid` x `grid` cells; `tiles[cell]` is a place in a list of tiles, `items` those that aren't negatives."""

    grid: int
    tiles: tuple[int, ...]
    items: tuple[Item, ...]

    def box(self, cell: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of a cell in pixels."""
        row, column = divmod(cell, self.grid)
        edge = [round(k * SIDE / self.grid) for k in range(self.grid + 1)]
        return edge[column], edge[row], edge[column + 1], edge[row + 1]


@dataclass(frozen=True)
class Asked:
    """A question with its answer, its kind of `KINDS`, and the places in `Scene.items` that its first and second object have.

    `about[1]` equals `about[0]` where a question compares nothing; a set may be empty.
    """

    question: str
    answer: str
    kind: str
    about: tuple[frozenset[int], frozenset[int]]


def draw_hard_scene(tiles: Sequence[Tile], rng: random.Random) -> Scene:
    """Draw a grid, its tiles and the four or five cells that are asked about; every tile's facts must be known."""
    grid = rng.choice(GRIDS)
    chosen = rng.sample(range(len(tiles)), grid * grid)
    items = []
    for cell in sorted(rng.sample(range(grid * grid), rng.choice((4, 5)))):
        tile = tiles[chosen[cell]]
        items.append(Item(tile.color or "", tile.shape or "", *divmod(cell, grid)))
    return Scene(grid, tuple(chosen), tuple(items))


def paint(scene: Scene, pictures: Sequence[Image.Image]) -> Image.Image:
    """Return the scene, `SIDE` x `SIDE` RGB: `pictures` are its tiles' images, cell by cell; all but the items' are inverted."""
    image = Image.new("RGB", (SIDE, SIDE))
    light = {item.row * scene.grid + item.column for item in scene.items}
    for cell, picture in enumerate(pictures):
        left, top, right, bottom = scene.box(cell)
        small = picture.convert("RGB").resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        image.paste(small if cell in light else ImageOps.invert(small), (left, top))
    return image


def _where(items: Sequence[Item], color: str | None = None, shape: str | None = None) -> frozenset[int]:
    return frozenset(
        k for k, item in enumerate(items) if color in (None, item.color) and shape in (None, item.shape)
    )


def _attribute(scene: Scene, rng: random.Random) -> Asked | None:
    item = rng.choice(scene.items)
    if rng.random() < 0.5:
        about = _where(scene.items, shape=item.shape)
        question, answer = f"what color is the {item.shape}?", item.color
    else:
        about = _where(scene.items, color=item.color)
        question, answer = f"what is the {item.color} shape?", item.shape
    return Asked(question, answer, "attribute", (about, about)) if len(about) == 1 else None


def _position(scene: Scene, rng: random.Random) -> Asked | None:
    item = rng.choice(scene.items)
    about = _where(scene.items, item.color, item.shape)
    across = rng.random() < 0.5
    twice = 2 * (item.column if across else item.row) - (scene.grid - 1)  # 0: in the middle
    if len(about) > 1 or twice == 0:
        return None
    low, high = ("left", "right") if across else ("top", "bottom")
    question = f"is the {item.name} on the left or the right?"
    if not across:
        question = f"is the {item.name} at the top or the bottom?"
    return Asked(question, low if twice < 0 else high, "position", (about, about))


def _relation(scene: Scene, rng: random.Random) -> Asked | None:
    one, other = rng.sample(scene.items, 2)
    about = _where(scene.items, one.color, one.shape), _where(scene.items, other.color, other.shape)
    across = rng.random() < 0.5
    apart = one.column - other.column if across else one.row - other.row
    if len(about[0]) > 1 or len(about[1]) > 1 or apart == 0:
        return None
    low, high = ("left", "right") if across else ("above", "below")
    question = f"is the {one.name} above or below the {other.name}?"
    if across:
        question = f"is the {one.name} to the left or the right of the {other.name}?"
    return Asked(question, low if apart < 0 else high, "relation", about)


def _count(scene: Scene, rng: random.Random) -> Asked | None:
    shape = rng.choice(SHAPES)
    about = _where(scene.items, shape=shape)
    return Asked(f"how many {shape}s are there?", str(len(about)), "count", (about, about))


def _comparison(scene: Scene, rng: random.Random) -> Asked | None:
    one, other = rng.sample(SHAPES, 2)
    about = _where(scene.items, shape=one), _where(scene.items, shape=other)
    more = len(about[0]) > len(about[1])
    if not more and rng.random() < 0.35:  # ties make "no" the likelier answer
        return None
    return Asked(f"are there more {one}s than {other}s?", "yes" if more else "no", "comparison", about)


def _negation(scene: Scene, rng: random.Random) -> Asked | None:
    if rng.random() < 0.5:
        item = rng.choice(scene.items)
        alike = _where(scene.items, shape=item.shape)
        about = alike - _where(scene.items, color=item.color)
        if len(alike) != 2 or len(about) != 1:
            return None
        (other,) = about
        question = f"what color is the {item.shape} that is not {item.color}?"
        return Asked(question, scene.items[other].color, "negation", (about, about))
    # Both answers as likely, and where it isn't there both its colour and its shape are, where possible.
    present = rng.random() < 0.5
    there = {(item.color, item.shape) for item in scene.items}
    apart = {(one.color, other.shape) for one in scene.items for other in scene.items} - there
    pairs = sorted(there if present else apart)
    if not pairs:
        return None
    color, shape = rng.choice(pairs)
    about = _where(scene.items, color, shape)
    return Asked(f"is there no {color} {shape}?", "no" if present else "yes", "negation", (about, about))


DRAWS = 1000  # far more than a scene with enough questions takes
_MAKERS = (_attribute, _position, _relation, _count, _comparison, _negation)
_WEIGHTS = (0.25, 0.15, 0.2, 0.15, 0.1, 0.15)


def hard_questions(scene: Scene, count: int, rng: random.Random) -> list[Asked]:
    """Draw `count` (at most 12) distinct questions about a scene, a conversation in their order; fewer where it has no more.

    Items that are all alike have ten.
    """
    if not 0 <= count <= 12:
        raise ValueError(f"{count} questions a hard scene: choose 0 to 12")
    found: dict[str, Asked] = {}
    for _ in range(DRAWS):
        if len(found) == count:
            break
        asked = rng.choices(_MAKERS, _WEIGHTS)[0](scene, rng)
        if asked is not None:
            found.setdefault(asked.question, asked)
    return list(found.values())
