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
    add(
        "--sharegpt4v",
        type=Path,
        metavar="JSON",
        help="captions, e.g. sharegpt4v_instruct_gpt4-vision_cap100k.json",
    )
    add("--images", type=Path, metavar="DIR", help="only samples whose image is there; evaluation reads it")
    add(
        "--allow_outside",
        action="store_true",
        help="images may lie outside of --images ('..', absolute, links)",
    )
    add(
        "--exclude",
        type=Path,
        metavar="JSON",
        required=True,
        help="the base model's training mixture, llava_v1_5_mix665k.json: none of its images may occur",
    )
    add("--output", type=Path, metavar="DIR", default=Path("data/generation"), help="default: %(default)s")
    add("--size", type=int, help="samples of each LVIS set (default: the paper's 1,000)")
    add("--seed", type=int, default=0)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.instruct is None and args.sharegpt4v is None:
        raise UserError("build-lvis: give --instruct, --sharegpt4v, or both")
    if args.size is not None and args.size < 1:
        raise UserError(f"--size {args.size}: must be positive")
    places = args.output, args.instruct, args.sharegpt4v, args.images, args.exclude
    build(*places, args.size, args.seed, args.allow_outside)
    return 0


def build(
    output: Path,
    instruct: Path | None,
    sharegpt4v: Path | None,
    images: Path | None,
    exclude: Path,
    size: int | None = None,
    seed: int = 0,
    allow_outside: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Write the sets that the given files allow to `output`, each file whole.

    Parameters
    ----------
    instruct, sharegpt4v : Path or None
        LLaVA-format JSON of LVIS-Instruct4V and of ShareGPT4V's captions.
    images : Path or None
        Where their images are.
    exclude : Path
        LLaVA-format JSON of the training mixture.
    allow_outside : bool
        Images may lie outside of `images`.
    report : callable
        Takes the lines that say what each rule left.

    Raises
    ------
    UserError
        For a file that can't be read, an output that can't be written, an image outside of `images`, or, once the others
        are written, a set without any candidate.
    """
    from dynllava_plugin.evaluation.own_sets.generation.conversations import images_of, read_conversations
    from dynllava_plugin.evaluation.own_sets.generation.rules import MULTI, SHAREGPT4V, SINGLE, select
    from dynllava_plugin.evaluation.own_sets.generation.sets import write_set

    check_folder("--output", output)
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    found = None if images is None else _finder(images, allow_outside)
    excluded = images_of(exclude)
    report(f"{exclude}: {len(excluded)} images of the training mixture")
    empty: list[str] = []
    for path, sets in ((instruct, (SINGLE, MULTI)), (sharegpt4v, (SHAREGPT4V,))):
        if path is None:
            continue
        conversations, broken = read_conversations(path)
        _report_broken(path, broken, report)
        for rules in sets:
            wanted = size if rules.size is not None else None
            chosen, counts = select(conversations, rules, excluded, found, seed, wanted)
            report(f"{rules.name}:")
            for text, count in counts:
                report(f"  {count:8,} {text}")
            if not chosen:
                empty.append(f"{rules.name}: no conversation of {path} is left")
                continue
            facts = {"source": path.name, "excluded": exclude.name, "seed": seed, "counts": counts}
            write_set(output, rules.name, chosen, images, facts)
    if empty:
        raise UserError("; ".join(empty) + " (the counts above say why; the other sets are written)")
    report(f"written to {output}")


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


def _report_broken(path: Path, broken: Sequence[str], report: Callable[[str], None]) -> None:
    if not broken:
        return
    report(f"{path}: {len(broken)} broken entries left out")
    for line in broken[:_NAMED]:
        report(f"  {line}")
    if len(broken) > _NAMED:
        report(f"  and {len(broken) - _NAMED} more")
