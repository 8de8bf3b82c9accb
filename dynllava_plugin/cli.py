"""The command `dynllava`: `dynllava table RESULTS_DIR`, `dynllava benchmarks`, `dynllava version`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dynllava_plugin.errors import UserError


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
    convert = commands.add_parser("convert", help="a checkpoint of any layout in another one")
    convert.add_argument("source", metavar="SOURCE", help="folder or hub id; an adapter is merged")
    convert.add_argument("target", type=Path, metavar="TARGET", help="a new folder")
    convert.add_argument(
        "--to",
        choices=("dynamic", "published"),
        default="dynamic",
        help="this package's layout, or the published code's (default: %(default)s)",
    )
    convert.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.model, for --to published"
    )
    convert.set_defaults(run=_convert)
    push = commands.add_parser("push", help="upload a checkpoint with a model card")
    push.add_argument("checkpoint", type=Path, metavar="DIR", help="a trained model's folder")
    push.add_argument("hub_id", nargs="?", metavar="OWNER/NAME", help="without it only README.md is written")
    push.add_argument(
        "--results", type=Path, metavar="RESULTS_DIR", help="both harnesses' output, as a table"
    )
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.set_defaults(run=_push)
    version = commands.add_parser("version", help="installed versions of what decides the numbers")
    version.set_defaults(run=_version)
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


def _convert(args: argparse.Namespace) -> int:
    from dynllava_plugin.model.checkpoints.converting import convert

    notes = convert(args.source, args.target, args.to, args.tokenizer)
    print("\n".join([f"wrote {args.target}", *notes]))
    return 0


def _push(args: argparse.Namespace) -> int:
    from dynllava_plugin.evaluation.tables import read_results, render
    from dynllava_plugin.model.checkpoints.card import push, write_card

    results = render(read_results(args.results), "markdown") if args.results else None
    if args.hub_id is None:
        print(f"wrote {write_card(args.checkpoint, results)}")
    else:
        print(f"pushed to {push(args.checkpoint, args.hub_id, results, args.private)}")
    return 0


def _version(args: argparse.Namespace) -> int:
    from dynllava_plugin.evaluation.records import versions

    for name, number in versions().items():
        print(f"{name} {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
