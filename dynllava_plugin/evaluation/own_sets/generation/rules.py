"""Which conversations belong to a generation set, and which of them are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from dynllava_plugin.evaluation.own_sets.generation.conversations import Conversation

Rule = tuple[str, Callable[[Conversation], bool]]


class SetRules(NamedTuple):
    """One set: its file's name and lmms-eval's tasks' stem, rules applied in order, how many are drawn (None: all)."""

    name: str
    rules: tuple[Rule, ...]
    size: int | None


SINGLE = SetRules(
    "lvis_vqa_single",
    (
        ("one round", lambda item: len(item.turns) == 1),
        ("an answer of more than 100 words", lambda item: item.words > 100),
    ),
    1000,
)
MULTI = SetRules(
    "lvis_vqa_multi",
    (
        ("more than seven rounds", lambda item: len(item.turns) > 7),
        ("answers of more than 300 words in all", lambda item: item.words > 300),
    ),
    1000,
)
SHAREGPT4V = SetRules(
    "sharegpt4v_vqa",
    (
        ("one round", lambda item: len(item.turns) == 1),
        ("a caption of at least 300 words", lambda item: item.words >= 300),
    ),
    None,
)


def select(
    conversations: Sequence[Conversation],
    rules: SetRules,
    excluded: Collection[str],
    available: Callable[[str], bool] | None,
    seed: int,
    size: int | None,
) -> tuple[list[Conversation], list[tuple[str, int]]]:
    """Return the set, and how many candidates each rule left.

    Parameters
    ----------
    excluded : collection of str
        File names of images that may not occur.
    available : callable or None
        Whether an image is there; None: not asked.
    seed : int
        The same conversations in any order give the same set.
    size : int or None
        Instead of the rules' own.
    """
    left = list(conversations)
    counts = [("conversations", len(left))]
    steps: list[Rule] = [
        *rules.rules,
        ("no image of the training mixture", lambda item: Path(item.image).name not in excluded),
    ]
    if available is not None:
        steps.append(("its image in --images", lambda item: available(item.image)))
    for text, keeps in steps:
        left = [item for item in left if keeps(item)]
        counts.append((text, len(left)))
    left.sort(key=lambda item: (item.id, item.image, item.turns))
    wanted = rules.size if size is None else size
    if wanted is not None and wanted < len(left):
        left = random.Random(f"{rules.name} {seed}").sample(left, wanted)
        counts.append((f"drawn, seed {seed}", len(left)))
    return left, counts
