"""Public functions' docstrings are sentences with a verb, in the rooms that have been read through."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("bench", "compare", "demo", "easy_vqa", "evaluation", "serve", "visualize")
READ = (*(f"dynllava_plugin/{room}" for room in ROOMS), "train")
# The bundled model's own recipe.
NOT_READ = "train/tiny_llava/"
# What a fragment begins with: "The layer before.", "Of a long answer.", "``mode`` as it was.", "Means over samples."
FRAGMENT = re.compile(
    r"(?:an?|the|this|these|those|its|their|what|how|where|which|one|two|each|every|all|some|no|any|as|of|from|for|in|on|at|by|with"
    r"|without|under|behind|beyond|rows?|columns?|means?|bytes|seconds|tokens|names?|settings?|called|questions?|answers?)\b(?!:)"
    r"|[`(\[0-9]",
    re.IGNORECASE,
)


def fragments(source: str) -> Iterator[str]:
    """Yield `name: first line` of every public function, method and property whose docstring is no sentence."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            first = text.splitlines()[0] if text else ""
            if (
                text is not None
                and FRAGMENT.match(first)
                and not re.match(r"(Answer|Name|Set) [a-z`]", first)
            ):
                yield f"{node.name}: {first}"


@pytest.mark.parametrize("room", READ)
def test_docstrings_are_sentences(room: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in sorted((ROOT / room).rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(NOT_READ)
        for line in fragments(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_fragments_are_found() -> None:
    for text in (
        "The layer before.",
        "Of a long answer.",
        "``mode`` as it was.",
        "Means over samples.",
        "[B, L] of bools.",
    ):
        assert list(fragments(f'def one():\n    """{text}"""\n')) == [f"one: {text}"]
    for text in ("Return the layer before.", "Whether it is one.", "Answer a question.", "Write a file."):
        assert list(fragments(f'def one():\n    """{text}"""\n')) == []
