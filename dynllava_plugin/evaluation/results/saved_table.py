"""The columns of the tidy table, and the table as it was written to CSV: what is left of results whose runs are elsewhere."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import UNITS
from dynllava_plugin.evaluation.results.manifest import SETTINGS

NAME = "table.csv"
COUNTS = (
    "image_tokens",
    "kept_image_tokens",
    "generated_tokens",
    "kept_tokens",
    "kept_output_share",
    "equivalent_tokens",
    "prefill_gflops",
)
COSTS = ("kv_mib", "decode_tflops", "decode_tflops_kept")
KEYS = ("checkpoint", "mode", "harness", "benchmark", "metric")
COLUMNS = (*KEYS, "value", "stderr", "unit", "n", "status", *SETTINGS, *COUNTS, "seconds", "file")
NUMBERS = ("value", "stderr", "seconds", *COUNTS, "vision_keep_rate", "text_keep_rate", "random_seed")
SCORED = "scored"  # the `status` of a figure


def read_saved(path: Path) -> pd.DataFrame:
    """Return the rows as they were, columns that the file lacks empty; `UserError` for a file that is no such table."""
    needed, numbers = (*KEYS, "value"), ("n", *NUMBERS)
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
    table = table.reindex(columns=list(COLUMNS)).astype(object)
    for name in numbers:
        try:
            table[name] = table[name].astype(float)
        except ValueError as error:
            raise UserError(f"{path}: column {name}: {error}") from None
    table["unit"] = table["unit"].fillna("") if "unit" in known else table["metric"].map(UNITS).fillna("")
    table["status"] = table["status"].where(table["status"].notna() | table["value"].isna(), SCORED)
    table = table.where(table.notna(), None).astype(dict.fromkeys(numbers, float))
    counted = table["n"].notna().all()
    return table.astype({"n": int}) if counted else table
