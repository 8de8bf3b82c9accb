"""`dynllava table RESULTS_DIR` and `dynllava benchmarks`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError


def add_parser(commands: Any) -> None:
    """Add the subcommands to the ones of `dynllava`."""
    table = commands.add_parser("table", help="one table over lmms-eval's and VLMEvalKit's results")
    table.add_argument(
        "results", type=Path, metavar="RESULTS_DIR", help="folder that holds both harnesses' output"
    )
    table.add_argument(
        "--format",
        choices=("markdown", "csv", "latex"),
        default="markdown",
        help="csv: one figure a row; the others: laid out for reading (default: %(default)s)",
    )
    table.add_argument(
        "--compare-paper",
        action="store_true",
        help="the paper's tables 1, 3 and 12 beside these results, with differences",
    )
    table.add_argument(
        "--llm",
        choices=("7B", "13B"),
        help="whose figures of the paper (default: 13B where the checkpoint's name says so, else 7B)",
    )
    table.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures, one a record, to FILE"
    )
    table.set_defaults(run=_table)
    benchmarks = commands.add_parser("benchmarks", help="what each benchmark is called in each harness")
    benchmarks.set_defaults(run=_benchmarks)


def _table(args: argparse.Namespace) -> int:
    from dynllava_plugin.evaluation.results.footer import footer
    from dynllava_plugin.evaluation.results.paper import compare, render_comparison
    from dynllava_plugin.evaluation.results.results import read_results
    from dynllava_plugin.evaluation.results.tables import left_out, render
    from dynllava_plugin.files import write_text

    table = read_results(args.results)
    if args.json:
        try:
            write_text(args.json, table.to_json(orient="records", indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json}: can't be written ({error.strerror})") from None
    if args.compare_paper:
        text = render_comparison(compare(table, args.llm), args.format)
        text += left_out(table) if args.format == "markdown" else ""
    else:
        text = render(table, args.format)
    if args.format == "markdown":
        text += footer([args.results])
    print(text, end="")
    return 0


def _benchmarks(args: argparse.Namespace) -> int:
    print(benchmarks_text(), end="")
    return 0


def benchmarks_text() -> str:
    """Return the registry as a Markdown table."""
    import pandas as pd

    from dynllava_plugin.evaluation.benchmarks import BENCHMARKS, LMMS_EVAL, VLMEVALKIT
    from dynllava_plugin.evaluation.results.paper import METHODS, paper_value
    from dynllava_plugin.evaluation.results.tables import frame_text

    rows = []
    for item in BENCHMARKS:
        metrics = (metric.name + ("" if metric.higher_is_better else " ↓") for metric in item.metrics)
        value = paper_value(item, item.metrics[0], METHODS["image_text"], "7B")
        rows.append(
            {
                "benchmark": item.name,
                "split": item.split,
                "lmms-eval `--tasks`": ", ".join(f"`{name}`" for name in item.tasks(LMMS_EVAL)) or "-",
                "VLMEvalKit `--data`": ", ".join(f"`{name}`" for name in item.tasks(VLMEVALKIT)) or "-",
                "metrics (↓: lower is better)": ", ".join(metrics),
                "needs": item.needs,
                "paper, 7B I|T": "" if value is None else f"{value:g}",
            }
        )
    return frame_text(pd.DataFrame(rows), "markdown")
