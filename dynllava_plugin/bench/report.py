"""Rows as a folder: table.csv, table.md, plots, and the machine they were measured on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.bench.figures import FIGURES, heading, written
from dynllava_plugin.bench.never_slower import never_slower
from dynllava_plugin.bench.paper import beside_the_paper
from dynllava_plugin.bench.plots import draw
from dynllava_plugin.bench.rows import machine_file, read_rows
from dynllava_plugin.errors import UserError
from dynllava_plugin.files import write_json, write_text
from dynllava_plugin.markup import MARKDOWN

SECTIONS = {
    "prefill": "Prefill",
    "nocache": "Decoding without cache, one step",
    "decode": "Decoding with cache, one step",
    "batching": "Batches of mixed prompt lengths against a batch of one (speed-up in tokens/s)",
    "score": "Scoring an answer in one pass against token by token",
    "memory": "Memory; the peak is above the weights",
    "serve": "Serving over HTTP: as many clients at once as `batch` says, answers of `at` tokens",
    "load": "Loading a checkpoint against reading it with safetensors alone",
    "attention": "One training attention, forward and backward; plain: the full matrix, sdpa: causal, without masks",
    "step": "A whole training step",
    "harness": "Questions a second from the first on, medians of interleaved runs; speed-up over batch 1",
}
# What rows of one part of the report have in common; named, where the value alone says nothing.
COMMON = ("shape", "benchmark", "checkpoint", "policy", "device", "dtype", "limit", "threads")
NAMED = ("policy", "limit", "threads")


def run(args: argparse.Namespace) -> int:
    """Report over the files that the command line names; return 0."""
    report(args.files, args.output)
    return 0


def report(paths: list[Path], folder: Path) -> None:
    """Write one report over files of rows, each with its machine's description beside it.

    Raises
    ------
    UserError
        A file that isn't there or holds something else, or rows of several kinds.
    """
    rows = [row for path in paths for row in read_rows(path)]
    if not rows:
        raise UserError(f"{paths[0]}: no rows in it; measure something first")
    kinds = {
        next((name for name in ("harness", "implementation", "mode") if name in row), None) for row in rows
    }
    if len(kinds) > 1 or None in kinds:
        raise UserError(
            "report: rows of `bench train`, `bench harness` and other phases don't go into one table; name them apart"
        )
    if kinds == {"harness"}:
        rows = [{str(name): value for name, value in row.items()} for row in medians(rows).to_dict("records")]
    write_text(folder / "table.csv", pd.DataFrame(rows).to_csv(index=False))
    write_text(folder / "table.md", markdown(rows))
    write_json(folder / "machine.json", _machines(paths))
    try:
        draw(pd.DataFrame(rows), folder)
    except ImportError:
        print("no plots: matplotlib isn't installed", file=sys.stderr)


def medians(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row a harness and batch size.

    Returns
    -------
    DataFrame
        What ran; medians over the repeats of ``questions_per_s``, ``outside_model`` (share of the time since the first question
        that was spent outside the model), ``speedup`` (of a repeat to its neighbour of batch size 1) and ``shared`` (share of the
        prompts in batches that shared a prefill); ``same_answers`` (as batch size 1 in every repeat), ``questions``, ``repeats``.
        NaN where batch size 1 is missing.
    """
    ran = "phase device checkpoint checkpoint_hash policy benchmark limit threads harness".split()
    table = pd.DataFrame(rows)
    table["outside_model"] = 1 - table["model_s"] / table["answering_s"]
    table["shared"] = table["shared_prompts"] / table["questions"]
    single = table[table["batch"] == 1][[*ran, "repeat", "questions_per_s", "predictions"]]
    table = table.merge(single, on=[*ran, "repeat"], suffixes=("", "_single"), how="left")
    table["speedup"] = table["questions_per_s"] / table["questions_per_s_single"]
    same = (table["predictions"] == table["predictions_single"]).astype(float)
    table["same_answers"] = same.where(table["predictions_single"].notna())
    groups = table.groupby([*ran, "batch"], sort=False)
    found = groups[["questions_per_s", "speedup", "outside_model", "shared"]].median()
    found["same_answers"] = groups["same_answers"].min().map({1.0: "yes", 0.0: "NO"})
    found["questions"], found["repeats"] = groups["questions"].max(), groups["repeat"].nunique()
    return found.reset_index().sort_values(["device", "harness", "batch"], ignore_index=True)


def _machines(paths: list[Path]) -> dict[str, Any]:
    """Device -> its description; a second machine with a device of that name goes by its file's name, too."""
    found: dict[str, Any] = {}
    for path in paths:
        device = next((row["device"] for row in read_rows(path, ("device",))), "cpu")
        described = machine_file(path)
        facts = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else None
        found[device if found.get(device, facts) == facts else f"{device} ({path.stem})"] = facts
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a table for each phase of rows that were measured under the same conditions, then the paper's layouts."""
    parts = [
        "# Measured",
        "Medians of interleaved runs. ms a call; a step of decoding is one token a sample.",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        texts = (f"{name} {row[name]}" if name in NAMED else str(row[name]) for name in COMMON if name in row)
        groups.setdefault(tuple(texts), []).append(row)
    for common, here in groups.items():
        parts.append(f"## {', '.join(common).translate(MARKDOWN)}")
        for phase, title in SECTIONS.items():
            found = [row for row in here if row["phase"] == phase]
            if found:
                parts += [f"### {title}", _table(found)]
    parts += [text for text in (never_slower(rows), *beside_the_paper(rows)) if text]
    if rows and all(row["device"] == "cpu" for row in rows):
        parts.append("A CUDA GPU: not measured.")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    shown = [name for name in FIGURES if any(row.get(name) is not None for row in rows)]
    if "mode" in shown:
        rows = sorted(rows, key=lambda row: (row["batch"], row["length"], row.get("path") or ""))
    cells = [
        {heading(name): written(name, row.get(name)).translate(MARKDOWN) for name in shown} for row in rows
    ]
    return pd.DataFrame(cells).to_markdown(index=False, disable_numparse=True)
