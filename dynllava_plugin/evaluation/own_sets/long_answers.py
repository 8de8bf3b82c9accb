"""The paper's generation sets as `build-lvis` built them: read by both harnesses, row by row the same."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.own_sets.text_metrics import meteor
from dynllava_plugin.files import json_lines, saved_json

DATA_VARIABLE, IMAGES_VARIABLE = "DYNLLAVA_GENERATION", "DYNLLAVA_IMAGES"
_DEFAULT = Path("data/generation")


def data_folder() -> Path:
    """Return where the built sets are looked for."""
    return Path(os.environ.get(DATA_VARIABLE) or _DEFAULT).resolve()


def load_rows(name: str) -> list[dict[str, Any]]:
    """Return a set's samples in their order.

    Returns
    -------
    list of dict
        ``id``, ``image`` (absolute path), ``turns`` (list of (question, answer)).

    Raises
    ------
    UserError
        If the set isn't built, isn't ours, or its images aren't there.
    """
    folder = data_folder()
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; build it with `dynllava build-lvis` and name its folder's parent with "
            f"--data, or set {DATA_VARIABLE} to its folder"
        )
    root = _image_root(folder, name)
    rows = []
    for number, line in json_lines(path):
        try:
            row = json.loads(line)
            turns = [(str(question), str(answer)) for question, answer in row["turns"]]
            row = {"id": str(row["id"]), "image": str(row["image"]), "turns": turns}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}:{number}: not a row of build-lvis; build the set again") from None
        found = find_image(root, row["image"])
        if found is None:
            raise UserError(
                f"{path}:{number}: image {row['image']} isn't in {root}; give its folder with --images"
            )
        rows.append({**row, "image": str(found)})
    return rows


def _image_root(folder: Path, name: str) -> Path:
    given = os.environ.get(IMAGES_VARIABLE)
    if given:
        return Path(given).resolve()
    place = saved_json(folder / f"{name}.json").get("images")
    if place is None:
        raise UserError(f"{name}: the set doesn't say where its images are; give their folder with --images")
    return (folder / place).resolve()


def find_image(root: Path, name: str) -> Path | None:
    """Return the image under `root`, whose folder may stand for any leading folders of `name`."""
    parts = Path(name).parts
    for start in range(len(parts)):
        path = root.joinpath(*parts[start:])
        if path.is_file():
            return path
    return None


def mean_meteor(references: Sequence[str], answers: Sequence[str]) -> float:
    """Return METEOR in [0, 1] of a sample: the mean over its rounds, as in the paper."""
    scores = [meteor(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    return sum(scores) / len(scores)
