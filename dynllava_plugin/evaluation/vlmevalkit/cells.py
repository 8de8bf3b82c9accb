"""Cells that VLMEvalKit's files would change, kept as they were written: options, answers and predictions.

The kit reads its tables with pandas' guesses and writes predictions to Excel: an option "None" is no option, a
prediction "N/A" is missing, "=3" is a formula without a value, a long address is dropped, "007" becomes 7.
"""

from __future__ import annotations

import itertools
import string
import sys
from collections.abc import Callable
from typing import Any

import pandas as pd

from dynllava_plugin.evaluation.patches import Patches

# What pandas takes for a missing cell and a dataset or a model may mean.
_WORDS = {"None", "N/A", "n/a", "NA", "<NA>", "NULL", "null"}
_MISSING = {"", "nan", "NaN", "-nan", "-NaN", "#N/A", "#NA", "#N/A N/A"}
_TEXTS = {"question", "answer", "prediction", *string.ascii_uppercase}
_PLACEHOLDER = "<image>"


class _Tables:
    """pandas as the kit's reader sees it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pd, name)

    def read_csv(self, path: Any, **kwargs: Any) -> pd.DataFrame:
        names = pd.read_csv(path, nrows=0, **kwargs).columns
        return pd.read_csv(path, **kwargs, **_as_written(names))

    def read_excel(self, path: Any, **kwargs: Any) -> pd.DataFrame:
        names = pd.read_excel(path, nrows=0, **kwargs).columns
        return pd.read_excel(path, **kwargs, **_as_written(names))


def _as_written(names: Any) -> dict[str, Any]:
    """How to read columns of these names: texts keep what they say, in the others pandas guesses as ever."""
    missing = {name: _MISSING if name in _TEXTS else _MISSING | _WORDS for name in names}
    return {"keep_default_na": False, "na_values": missing, "dtype": {"prediction": str}}


def keep_cells(patches: Patches, kit: Any) -> None:
    """Let the kit (its command's module) read and write tables without changing what they say.

    What can be mended of a dataset that it builds is mended, and the rest is told.
    """
    import vlmeval.smp.file as files
    import xlsxwriter

    def of_texts(make: Callable[..., None]) -> Callable[..., None]:
        def make_of_texts(self: Any, filename: Any = None, options: dict[str, Any] | None = None) -> None:
            make(self, filename, {"strings_to_formulas": False, "strings_to_urls": False, **(options or {})})

        return make_of_texts

    def watching(build: Callable[..., Any]) -> Callable[..., Any]:
        def build_watched(name: str, *args: Any, **kwargs: Any) -> Any:
            dataset = build(name, *args, **kwargs)
            data = getattr(dataset, "data", None)
            if isinstance(data, pd.DataFrame):
                for line in mend_rows(name, data):
                    print(line, file=sys.stderr, flush=True)
            return dataset

        return build_watched

    patches.put(files, "pd", lambda before: _Tables())
    patches.put(xlsxwriter.Workbook, "__init__", of_texts)
    patches.put(kit, "build_dataset", watching)


def mend_rows(name: str, data: pd.DataFrame) -> list[str]:
    """Take ``data:`` prefixes off images and placeholders out of questions, and tell rows of one index apart, in place.

    Returns
    -------
    list of str
        A line for each thing that a reader of the score has to know.
    """
    told = []
    if "image" in data:
        data["image"] = [
            [_bare(image) for image in images] if isinstance(images, list) else _bare(images)
            for images in data["image"]
        ]
    if "question" in data:
        asks = data["question"].astype(str).str.contains(_PLACEHOLDER, regex=False)
        if asks.any():
            texts = data.loc[asks, "question"].str.replace(_PLACEHOLDER, "", regex=False)
            data.loc[asks, "question"] = texts.str.strip()
            told.append(
                f"{name}: {int(asks.sum())} questions have a literal {_PLACEHOLDER}, which is taken out; a row's "
                "images come before its question"
            )
    if "index" in data:
        repeated = data["index"].astype(str).duplicated()
        if repeated.any():
            data["index"] = _told_apart(list(data["index"]))
            told.append(
                f"{name}: {int(repeated.sum())} rows have the index of an earlier row, by which VLMEvalKit keeps answers; "
                "they are asked and scored under one of their own"
            )
    return told


def _told_apart(indices: list[Any]) -> list[Any]:
    """Return the indices with new ones for those that were there before: the next numbers, or ``7-2``."""
    numbers = all(isinstance(index, int) for index in indices)
    following, seen = itertools.count(max(indices) + 1) if numbers else itertools.count(2), set()
    found = []
    for index in indices:
        if str(index) in seen:
            index = next(following) if numbers else f"{index}-{next(following)}"
        seen.add(str(index))
        found.append(index)
    return found


def _bare(image: Any) -> Any:
    """Base64 without ``data:image/png;base64,`` before it."""
    return image.partition(",")[2] if isinstance(image, str) and image.startswith("data:") else image
