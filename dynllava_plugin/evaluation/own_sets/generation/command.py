"""`dynllava build-lvis`: the paper's generation sets, selected by its rules."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import check_folder, leaves

_NAMED = 5  # broken entries that are named; all are counted


def add_parser(commands: Any) -> None:
    """Add the subcommand to the ones of `dynllava`."""
    parser = commands.add_parser(
        "build-lvis", help="select LVIS-VQA (single- and multi-round) and ShareGPT4V-VQA for both harnesses"
    )
    add = parser.add_argument
    add("--instruct", type=Path, metavar="JSON", help="lvis_instruct4v_220k.json")
    add("--sharegpt4v", type=Path, metavar="JSON",
        help="captions, e.g. sharegpt4v_instruct_gpt4-vision_cap100k.json")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="only samples whose image is there; evaluation reads it")
    add("--allow_outside", action="store_true",
        help="images may lie outside of --images ('..', absolute, links)")  # fmt: skip
    add("--exclude", type=Path, metavar="JSON", required=True,
        help="the base model's training mixture, llava_v1_5_mix665k.json: none of its images may occur")  # fmt: skip
    add("--output", type=Path, metavar="DIR", default=Path("data/generation"), help="default: %(default)s")
    add("--size", type=int, help="samples of each LVIS set (default: the paper's 1,000)")
    add("--seed", type=int, default=0)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Write the sets that the given files allow, each file whole; say what each rule left."""
    from dynllava_plugin.evaluation.own_sets.generation.conversations import images_of, read_conversations
    from dynllava_plugin.evaluation.own_sets.generation.rules import MULTI, SHAREGPT4V, SINGLE, select
    from dynllava_plugin.evaluation.own_sets.generation.sets import write_set

    if args.instruct is None and args.sharegpt4v is None:
        raise UserError("build-lvis: give --instruct, --sharegpt4v, or both")
    if args.size is not None and args.size < 1:
        raise UserError(f"--size {args.size}: must be positive")
    check_folder("--output", args.output)
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder")
    found = None if args.images is None else _finder(args.images, args.allow_outside)
    excluded = images_of(args.exclude)
    print(f"{args.exclude}: {len(excluded)} images of the training mixture")
    empty: list[str] = []
    for path, sets in ((args.instruct, (SINGLE, MULTI)), (args.sharegpt4v, (SHAREGPT4V,))):
        if path is None:
            continue
        conversations, broken = read_conversations(path)
        _report_broken(path, broken)
        for rules in sets:
            wanted = args.size if rules.size is not None else None
            chosen, counts = select(conversations, rules, excluded, found, args.seed, wanted)
            print(f"{rules.name}:")
            for text, count in counts:
                print(f"  {count:8,} {text}")
            if not chosen:
                empty.append(f"{rules.name}: no conversation of {path} is left")
                continue
            facts = {"source": path.name, "excluded": args.exclude.name, "seed": args.seed, "counts": counts}
            write_set(args.output, rules.name, chosen, args.images, facts)
    if empty:
        raise UserError("; ".join(empty) + " (the counts above say why; the other sets are written)")
    print(f"written to {args.output}")
    return 0


def _finder(images: Path, allow_outside: bool) -> Callable[[str], bool]:
    from dynllava_plugin.evaluation.own_sets.generation.sets import find_image

    def find(name: str) -> bool:
        found = find_image(images, name)
        if found is not None and not allow_outside and leaves(images, os.path.relpath(found, images)):
            raise UserError(
                f"--images {images}: {name} lies outside of it; mend the path, or --allow_outside"
            )
        return found is not None

    return find


def _report_broken(path: Path, broken: Sequence[str]) -> None:
    if broken:
        more = [f"and {len(broken) - _NAMED} more"] if len(broken) > _NAMED else []
        print(f"{path}: {len(broken)} broken entries left out", *broken[:_NAMED], *more, sep="\n  ")
