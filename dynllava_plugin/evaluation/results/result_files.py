"""Files of harnesses and of earlier runs, read with distrust: any of them may be cut short or something else."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.errors import UserError

_said: set[str] = set()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a harness or a run of ours wrote; anything else is a `UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path}: not a readable JSON file ({reason}); delete it or run the evaluation again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a harness's results; delete it or name another folder")
    return content


def number(value: Any) -> float | None:
    """A finite number; None for everything else, truth values too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def question_count(value: Any, path: Path) -> int | None:
    """How many questions a file says were asked.

    Raises
    ------
    UserError
        For something that is no count.
    """
    found = number(value)
    if value is not None and (found is None or found < 0):
        raise UserError(f"{path}: not a harness's results (the number of questions is {value!r})")
    return None if found is None else int(found)


def prediction_rows(folder: Path, stem: str) -> int | None:
    """Questions in VLMEvalKit's prediction file; None where it has none that can be read."""
    path = folder / f"{stem}.tsv"
    try:
        if path.is_file():
            return len(pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False))
        path = folder / f"{stem}.xlsx"
        return len(pd.read_excel(path)) if path.is_file() else None
    except Exception as error:  # its readers raise what the damage made of them: zip, XML and key errors
        say_skipped(f"{path}: not a readable file of predictions ({type(error).__name__})")
        return None


def say_skipped(problem: object) -> None:
    """One line, once, for a file that is left out of a table."""
    line = " ".join(str(problem).split())
    if line not in _said:
        _said.add(line)
        print(f"skipped: {line}", file=sys.stderr, flush=True)
