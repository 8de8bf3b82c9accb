"""A tidy table that was written to CSV: what is left of results whose runs are elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import UNITS

NAME = "table.csv"


def read_saved(
    path: Path, columns: Sequence[str], needed: Sequence[str], numbers: Sequence[str], scored: str
) -> pd.DataFrame:
    """Return the rows as they were.

    Parameters
    ----------
    columns : sequence of str
        Of the result; those that the file lacks are empty.
    needed : sequence of str
        Of `columns`; what names a row and its figure.
    numbers : sequence of str
        Of `columns`; the others are text.
    scored : str
        The `status` of a figure in a file without that column.

    Raises
    ------
    UserError
        For a file that is no such table.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from None
    missing = [name for name in needed if name not in table]
    if missing:
        raise UserError(f"{path}: no table of results (it has no column {', '.join(missing)})")
    unnamed = table[[name for name in needed if name not in numbers]].isna().any(axis="columns")
    if table.empty or unnamed.any():
        raise UserError(
            f"{path}: no table of results ({'a row without a name' if len(table) else 'no rows'})"
        )
    known = set(table)
    table = table.reindex(columns=list(columns)).astype(object)
    for name in numbers:
        try:
            table[name] = table[name].astype(float)
        except ValueError as error:
            raise UserError(f"{path}: column {name}: {error}") from None
    table["unit"] = table["unit"].fillna("") if "unit" in known else table["metric"].map(UNITS).fillna("")
    table["status"] = table["status"].where(table["status"].notna() | table["value"].isna(), scored)
    table = table.where(table.notna(), None).astype(dict.fromkeys(numbers, float))
    counted = table["n"].notna().all()
    return table.astype({"n": int}) if counted else table
