"""`dynllava build-lvis`: the paper's generation sets, selected by its rules from LVIS-Instruct4V and ShareGPT4V."""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.llava_json import JsonList, image_names, read_sample
from dynllava_plugin.evaluation.own_sets.long_answers import find_image
from dynllava_plugin.files import check_folder, leaves, write_json, write_text
from dynllava_plugin.model.prompts import IMAGE_TOKEN

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


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about one image.

    Attributes
    ----------
    id, image : str
        The image as the file names it.
    turns : tuple of (question, answer)
        Without image markers.
    """

    id: str
    image: str
    turns: tuple[tuple[str, str], ...]

    @property
    def words(self) -> int:
        """Return the number of words of all answers, as white space separates them."""
        return sum(len(answer.split()) for _, answer in self.turns)


def read_conversations(path: Path) -> tuple[list[Conversation], list[str]]:
    """Return the file's conversations, and a line for each entry that isn't one about one image.

    Raises
    ------
    UserError
        If the file can't be read or isn't a JSON list.
    """
    found, broken = [], []
    for number, entry in enumerate(JsonList(path)):
        identity = str(entry.get("id", number) if isinstance(entry, dict) else number)
        name = f"entry {number} (id {identity})"
        try:
            found.append(_conversation(name, identity, entry))
        except UserError as error:
            broken.append(str(error))
    return found, broken


def _conversation(name: str, identity: str, entry: Any) -> Conversation:
    sample = read_sample(name, entry)
    if len(sample.images) != 1:
        raise UserError(f"{name} has {len(sample.images)} images, not one")
    turns = [(question.replace(IMAGE_TOKEN, "").strip(), answer.strip()) for question, answer in sample.turns]
    return Conversation(identity, sample.images[0], tuple(turns))


def images_of(path: Path) -> set[str]:
    """Return the file names, without folders, of all images in a training mixture."""
    return {Path(image).name for entry in JsonList(path) for image in image_names(entry)}


Rule = tuple[str, Callable[[Conversation], bool]]


class SetRules(NamedTuple):
    """One set: its file's name and lmms-eval's tasks' stem, rules applied in order, how many are drawn (None: all)."""

    name: str
    rules: tuple[Rule, ...]
    size: int | None


SINGLE = SetRules(
    "lvis_vqa_single",
    (
        ("one round", lambda item: len(item.turns) == 1),
        ("an answer of more than 100 words", lambda item: item.words > 100),
    ),
    1000,
)
MULTI = SetRules(
    "lvis_vqa_multi",
    (
        ("more than seven rounds", lambda item: len(item.turns) > 7),
        ("answers of more than 300 words in all", lambda item: item.words > 300),
    ),
    1000,
)
SHAREGPT4V = SetRules(
    "sharegpt4v_vqa",
    (
        ("one round", lambda item: len(item.turns) == 1),
        ("a caption of at least 300 words", lambda item: item.words >= 300),
    ),
    None,
)


def select(
    conversations: Sequence[Conversation],
    rules: SetRules,
    excluded: Collection[str],
    available: Callable[[str], bool] | None,
    seed: int,
    size: int | None,
) -> tuple[list[Conversation], list[tuple[str, int]]]:
    """Return the set, and how many candidates each rule left.

    Parameters
    ----------
    excluded : collection of str
        File names of images that may not occur.
    available : callable or None
        Whether an image is there; None: not asked.
    seed : int
        The same conversations in any order give the same set.
    size : int or None
        Instead of the rules' own.
    """
    left = list(conversations)
    counts = [("conversations", len(left))]
    steps: list[Rule] = [
        *rules.rules,
        ("no image of the training mixture", lambda item: Path(item.image).name not in excluded),
    ]
    if available is not None:
        steps.append(("its image in --images", lambda item: available(item.image)))
    for text, keeps in steps:
        left = [item for item in left if keeps(item)]
        counts.append((text, len(left)))
    left.sort(key=lambda item: (item.id, item.image, item.turns))
    wanted = rules.size if size is None else size
    if wanted is not None and wanted < len(left):
        left = random.Random(f"{rules.name} {seed}").sample(left, wanted)
        counts.append((f"drawn, seed {seed}", len(left)))
    return left, counts


def write_set(
    folder: Path, name: str, chosen: Sequence[Conversation], images: Path | None, facts: dict[str, Any]
) -> None:
    """Write ``<name>.jsonl`` and what it was made from, ``<name>.json``.

    Raises
    ------
    UserError
        If the folder can't be written.
    """
    rows = [{"id": item.id, "image": item.image, "turns": list(item.turns)} for item in chosen]
    try:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{name}.jsonl", lines)
        place = os.path.relpath(images.resolve(), folder.resolve()) if images else None
        write_json(folder / f"{name}.json", {"samples": len(rows), "images": place, **facts})
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
