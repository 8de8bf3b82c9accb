"""What `bench harness` measured, for people: table.csv (medians, tidy), table.md, chart.png, machine.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.files import write_figure, write_json, write_text

HEAD = ["device", "checkpoint", "checkpoint_hash", "policy", "benchmark", "limit", "threads"]
ABOUT = [*HEAD, "harness", "batch"]


def medians(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a harness and batch size.

    Returns
    -------
    DataFrame
        `ABOUT`, medians over the repeats of `questions_per_s`, `outside_model` (share of the time since the first question
        that was spent outside the model), `speedup` (of a repeat to its neighbour of batch size 1) and `shared` (share of the
        prompts in batches that shared a prefill); `same_answers` (as batch size 1 in every repeat), `questions`, `repeats`.
        NaN where batch size 1 is missing.
    """
    table = pd.DataFrame(rows)
    table["outside_model"] = 1 - table["model_s"] / table["answering_s"]
    table["shared"] = table["shared_prompts"] / table["questions"]
    run = [name for name in ABOUT if name != "batch"] + ["repeat"]
    single = table[table["batch"] == 1][[*run, "questions_per_s", "predictions"]]
    table = table.merge(single, on=run, suffixes=("", "_single"), how="left")
    table["speedup"] = table["questions_per_s"] / table["questions_per_s_single"]
    same = (table["predictions"] == table["predictions_single"]).astype(float)
    table["same_answers"] = same.where(table["predictions_single"].notna())
    groups = table.groupby(ABOUT, sort=False)
    found = groups[["questions_per_s", "speedup", "outside_model", "shared"]].median()
    found["same_answers"] = groups["same_answers"].min().map({1.0: "yes", 0.0: "NO"})
    found["questions"], found["repeats"] = groups["questions"].max(), groups["repeat"].nunique()
    return found.reset_index().sort_values(["device", "harness", "batch"], ignore_index=True)


def write_harness_report(rows: list[dict[str, Any]], machines: dict[str, Any], folder: Path) -> None:
    """Write the four files, `machines` (device -> description) as machine.json; each appears whole or not at all."""
    table = medians(rows)
    write_text(folder / "table.csv", table.to_csv(index=False))
    write_text(folder / "table.md", markdown(table))
    write_json(folder / "machine.json", machines)
    try:
        draw(table, folder / "chart.png")
    except ImportError:
        print("no chart: matplotlib isn't installed", file=sys.stderr)


def markdown(table: pd.DataFrame) -> str:
    """A table a device and benchmark."""
    parts = ["# Questions a second", ""]
    for about, group in table.groupby(HEAD, sort=False):
        device, checkpoint, _, policy, benchmark, _, threads = about  # type: ignore[misc]
        parts += [
            f"{group['questions'].max():,} questions of {benchmark}, {checkpoint}, policy: {policy}; {device}, {threads} threads; "
            f"from the first question on, medians of {group['repeats'].min()} interleaved runs.",
            "",
            "| harness | batch | questions/s | of batch 1 | outside the model | prefill shared | same answers |",
            "|---" * 7 + "|",
            *(_line({str(name): value for name, value in row.items()}) for row in group.to_dict("records")),
        ]
        parts.append("")
    return "\n".join(parts)


def _line(row: dict[str, Any]) -> str:
    ratio = "-" if pd.isna(row["speedup"]) else f"{row['speedup']:.2f}x"
    same = "-" if pd.isna(row["same_answers"]) else row["same_answers"]
    return (
        f"| {row['harness']} | {row['batch']} | {row['questions_per_s']:.1f} | {ratio} | {row['outside_model']:.1%} | "
        f"{row['shared']:.0%} | {same} |"
    )


def draw(table: pd.DataFrame, path: Path) -> None:
    """Questions a second over the batch size, a line a harness."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for (device, harness), rows in table.groupby(["device", "harness"]):
        label = harness if table["device"].nunique() == 1 else f"{harness}, {device}"
        axis.plot(rows["batch"], rows["questions_per_s"], marker="o", label=label)
    sizes = sorted(set(table["batch"]))
    axis.set(xscale="log", xlabel="batch size", ylabel="questions/s", ylim=(0, None))
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    write_figure(path, figure)
