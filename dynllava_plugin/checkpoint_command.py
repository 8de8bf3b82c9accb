"""`dynllava convert` and `dynllava push`: a checkpoint in another layout, or on the hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the subcommands to the ones of `dynllava`."""
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


def _convert(args: argparse.Namespace) -> int:
    from dynllava_plugin.model.checkpoints.converting import convert

    notes = convert(args.source, args.target, args.to, args.tokenizer)
    print("\n".join([f"wrote {args.target}", *notes]))
    return 0


def _push(args: argparse.Namespace) -> int:
    from dynllava_plugin.evaluation.results.results import read_results
    from dynllava_plugin.evaluation.results.tables import render
    from dynllava_plugin.model.checkpoints.card import push, write_card

    results = render(read_results(args.results), "markdown") if args.results else None
    if args.hub_id is None:
        print(f"wrote {write_card(args.checkpoint, results)}")
    else:
        print(f"pushed to {push(args.checkpoint, args.hub_id, results, args.private)}")
    return 0
