"""The command `dynllava`: table, compare, show, bench, benchmarks, version."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from dynllava_plugin.errors import UserError

# Commands with a module of their own: `add_arguments(parser)` and `run(args)`.
SUBCOMMANDS = (
    (
        "compare",
        "dynllava_plugin.compare.command",
        "policies on one checkpoint: accuracy, equivalent tokens, time",
    ),
    (
        "show",
        "dynllava_plugin.visualize.command",
        "a picture of what each policy keeps of an image and its answer",
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 2 with one line for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="dynllava", description="Dynamic-LLaVA: tables, benchmarks, versions."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="one table over lmms-eval's and VLMEvalKit's results")
    table.add_argument(
        "results", type=Path, metavar="RESULTS_DIR", help="folder that holds both harnesses' output"
    )
    table.add_argument(
        "--format",
        choices=("markdown", "csv", "latex"),
        default="markdown",
        help="csv: one figure a row; the others: one mode a row (default: %(default)s)",
    )
    table.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures, one a record, to FILE"
    )
    table.set_defaults(run=_table)
    benchmarks = commands.add_parser("benchmarks", help="what each benchmark is called in each harness")
    benchmarks.set_defaults(run=_benchmarks)
    for name, module, text in SUBCOMMANDS:
        command = commands.add_parser(name, help=text)
        import_module(module).add_arguments(command)
        command.set_defaults(run=import_module(module).run)
    commands.add_parser("bench", help="time and memory of each mode, with random weights", add_help=False)
    version = commands.add_parser("version", help="installed versions of what decides the numbers")
    version.set_defaults(run=_version)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:  # its flags need PyTorch, which the others needn't wait for
        from dynllava_plugin.bench.command import main as bench

        return bench(arguments[1:])
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dynllava table ... | head`
        sys.stderr.close()
        return 0


def _table(args: argparse.Namespace) -> int:
    from dynllava_plugin.evaluation.files import write_text
    from dynllava_plugin.evaluation.tables import read_results, render

    table = read_results(args.results)
    if args.json:
        try:
            write_text(args.json, table.to_json(orient="records", indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json}: can't be written ({error.strerror})") from None
    print(render(table, args.format), end="")
    return 0


def _benchmarks(args: argparse.Namespace) -> int:
    from dynllava_plugin.evaluation.benchmarks import BENCHMARKS

    print("| benchmark | lmms-eval `--tasks` | VLMEvalKit `--data` | metrics |\n|---|---|---|---|")
    for item in BENCHMARKS:
        tasks = dict.fromkeys(metric.lmms_eval[0] for metric in item.metrics if metric.lmms_eval)
        datasets = dict.fromkeys(metric.vlmevalkit[0] for metric in item.metrics if metric.vlmevalkit)
        metrics = ", ".join(metric.name for metric in item.metrics) + (
            " (needs a judge)" if item.judge else ""
        )
        cells = [", ".join(f"`{name}`" for name in names) or "-" for names in (tasks, datasets)]
        print(f"| {item.name} | {cells[0]} | {cells[1]} | {metrics} |")
    return 0


def _version(args: argparse.Namespace) -> int:
    from dynllava_plugin.evaluation.records import versions

    for name, number in versions().items():
        print(f"{name} {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
