"""Scenes: four easy-VQA images tiled 2x2, with questions and descriptions made of the tiles' facts."""

import random

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES

Fact = tuple[str, str]  # (colour, shape)
PLACES = ("top left", "top right", "bottom left", "bottom right")
DESCRIBE = "Describe the image in detail."  # the prompt of the long test answers
_COLOR_AT = ("what color is the shape in the {}?", "what is the color of the shape in the {}?")
_SHAPE_AT = ("what shape is in the {}?", "what is the shape in the {}?")
_COLOR_OF = ("what color is the {}?", "what is the color of the {}?")
_IN_IMAGE = ("is there a {} in the image?", "does the image contain a {}?", "is a {} present?")
_AT_PLACE = ("is there a {} in the {}?",)


def _named(color: str | None, shape: str | None) -> str:
    return " ".join(word for word in (color, shape or "shape") if word)


def _where(facts: list[Fact], rng: random.Random) -> tuple[str, str]:
    """A wh-question about one place."""
    k = rng.randrange(4)
    which = rng.randrange(2)
    return rng.choice((_COLOR_AT, _SHAPE_AT)[which]).format(PLACES[k]), facts[k][which]


def _unique(facts: list[Fact], rng: random.Random) -> tuple[str, str] | None:
    """A wh-question about the only shape of its colour, or the only one of its kind; None without one."""
    which = rng.randrange(2)
    values = [fact[which] for fact in facts]
    single = [k for k in range(4) if values.count(values[k]) == 1]
    if not single:
        return None
    k = rng.choice(single)
    if which == 0:
        return f"what is the {facts[k][0]} shape?", facts[k][1]
    return rng.choice(_COLOR_OF).format(facts[k][1]), facts[k][0]


def _yes_no(facts: list[Fact], rng: random.Random) -> tuple[str, str] | None:
    """A yes/no question about the image or a place, both answers as likely; None where one can't be true.

    False statements are hard where possible: colour and shape both occur, but not together or not there.
    """
    at = rng.randrange(4) if rng.random() < 0.5 else None
    seen = facts if at is None else [facts[at]]
    kind = rng.choice(("color", "shape", "both"))

    def reduce(fact: Fact) -> tuple[str | None, str | None]:
        return (fact[0] if kind != "shape" else None, fact[1] if kind != "color" else None)

    true = {reduce(fact) for fact in seen}
    false = {reduce((c, s)) for c in COLORS for s in SHAPES} - true
    if not false:
        return None
    present = rng.random() < 0.5
    if present:
        color, shape = reduce(rng.choice(seen))  # every tile alike, also where two agree
    else:
        hard = {reduce((c, s)) for c, _ in facts for _, s in facts} & false
        color, shape = rng.choice(sorted(hard if hard and rng.random() < 0.7 else false, key=str))
    template = rng.choice(_IN_IMAGE if at is None else _AT_PLACE)
    place = () if at is None else (PLACES[at],)
    return template.format(_named(color, shape), *place), "yes" if present else "no"


def scene_questions(facts: list[Fact], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Distinct questions about a scene: most ask what is at a place, which pruning the wrong tokens makes unanswerable.

    Parameters
    ----------
    facts : list of four (colour, shape)
        Top left, top right, bottom left, bottom right.
    count : int
        At most 24: only so many are distinct for every scene.

    Returns
    -------
    list of (question, answer)
    """
    if not 0 <= count <= 24:
        raise ValueError(f"{count} questions a scene: choose 0 to 24")
    found: dict[str, str] = {}
    while len(found) < count:
        kind = rng.random()
        pair = (
            _where(facts, rng) if kind < 0.6 else _unique(facts, rng) if kind < 0.7 else _yes_no(facts, rng)
        )
        if pair is not None:
            found.setdefault(*pair)
    return list(found.items())


def _in_detail(f: list[str], c: list[str]) -> str:
    parts = " ".join(f"In the {place} there is {name}." for place, name in zip(PLACES, f, strict=True))
    return (
        f"The image is divided into four parts. {parts} So the upper half shows {f[0]} and {f[1]}, "
        f"and the lower half shows {f[2]} and {f[3]}."
    )


def _by_rows(f: list[str], c: list[str]) -> str:
    return (
        "There are four shapes in the image. "
        f"The first row shows {f[0]} on the left and {f[1]} on the right. "
        f"The second row shows {f[2]} on the left and {f[3]} on the right. On the left side the colors are "
        f"{c[0]} and {c[2]}, and on the right side the colors are {c[1]} and {c[3]}."
    )


def _from_the_end(f: list[str], c: list[str]) -> str:
    return (
        f"Starting in the bottom right, there is {f[3]}. To its left, in the bottom left, there is {f[2]}. "
        f"Above that, in the top left, there is {f[0]}. The last shape, in the top right, is {f[1]}. "
        "Together they make up the whole image."
    )


DESCRIPTIONS = {
    DESCRIBE: _in_detail,
    "What does the image show, row by row?": _by_rows,
    "Go through the image from the end.": _from_the_end,
}


def describe(facts: list[Fact], prompt: str = DESCRIBE) -> str:
    """Return the description that a prompt of `DESCRIPTIONS` asks for: all four facts joined, 65 to 75 tokens."""
    return DESCRIPTIONS[prompt](
        [f"a {color} {shape}" for color, shape in facts], [color for color, _ in facts]
    )
