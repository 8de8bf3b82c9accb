"""`dynllava answer QUESTIONS.jsonl`: answers to questions of one's own, both files as LLaVA's `model_vqa.py` has them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.options import add_flags, checked
from dynllava_plugin.evaluation.settings import PLACES, ModelSettings, RunSettings, settings_named
from dynllava_plugin.files import check_file, json_lines, leaves, write_text
from dynllava_plugin.model.prompts import IMAGE_TOKEN

_COUNTS = ("prompt_tokens", "image_tokens", "kept_image_tokens", "generated_tokens")
_ASKED = settings_named("limit", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("questions", type=Path, metavar="QUESTIONS.jsonl", help="lines with question_id, image and text")
    add("--image-folder", "--image_folder", type=Path, default=Path(), metavar="DIR",
        help="what the questions' images, or videos, are in (default: here)")  # fmt: skip
    add("--output", type=Path, required=True, metavar="ANSWERS.jsonl", help="a new file, written at the end")
    add("--max-new-tokens", "--max_new_tokens", type=int, help="of an answer (default: 1024)")
    add_flags(parser, fields(ModelSettings))
    add_flags(parser, _ASKED)


def run(args: argparse.Namespace) -> int:
    """Answer all questions in batches and write the answers; what was answered before an interruption isn't asked again."""
    from dynllava_plugin.evaluation.locks import locks, terminated_like_interrupted

    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {args.max_new_tokens} is not positive")
    settings = ModelSettings.from_dict(
        {item.name: getattr(args, item.name) for item in fields(ModelSettings)}
    )
    given = {item: getattr(args, item.name) for item in _ASKED if getattr(args, item.name) is not None}
    asking = RunSettings(**{item.name: checked(item, value, args.questions) for item, value in given.items()})
    check_file("--output", args.output)
    if args.output.exists():
        raise UserError(f"--output {args.output}: is there already; name a new file, or delete it")
    questions = read_questions(args.questions, args.image_folder)[: asking.limit]
    settings.check()
    unfinished = args.output.with_name(f".{args.output.name}-unfinished")
    try:
        with locks({unfinished}, "another `dynllava answer`"), terminated_like_interrupted():
            lines = _answers(questions, settings, asking.batch_size, args.max_new_tokens, unfinished)
            write_text(args.output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            shutil.rmtree(unfinished)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{len(questions)} answers: {args.output}")
    return 0


def read_questions(file: Path, image_folder: Path) -> list[dict[str, Any]]:
    """Return LLaVA's questions: ``question_id``, ``text``, and ``image``, which becomes the image's path.

    Raises
    ------
    UserError
        Naming the line: no JSON, an id that is missing or there twice, an empty text, an image that is missing or outside the folder.
    """
    try:
        lines = json_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    found, seen = [], dict[str, int]()
    for number, line in lines:
        try:
            found.append(_question(json.loads(line), image_folder, seen, number))
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}") from None
    if not found:
        raise UserError(f"{file}: has no questions")
    return found


def _question(row: Any, folder: Path, seen: dict[str, int], number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    name, text, image = (row.get(key) for key in ("question_id", "text", "image"))
    if isinstance(name, bool) or not isinstance(name, (int, str)) or name == "":
        raise ValueError("no question_id, which is a number or text")
    if seen.setdefault(str(name), number) != number:
        raise ValueError(f"question_id {name} is that of line {seen[str(name)]} too")
    if not isinstance(text, str) or not text.replace(IMAGE_TOKEN, "").strip():
        raise ValueError("text is empty or none")
    if not isinstance(image, str) or not image:
        raise ValueError("no image, which is a path in --image-folder")
    if leaves(folder, image):
        raise ValueError(f"image {image} lies outside of --image-folder {folder}")
    if not (folder / image).is_file():
        raise ValueError(f"image {image} isn't in --image-folder {folder}")
    return {"question_id": name, "text": text, "image": str(folder / image)}


def _answers(
    questions: list[dict[str, Any]],
    settings: ModelSettings,
    batch_size: int | str,
    tokens: int | None,
    folder: Path,
) -> list[dict[str, Any]]:
    from dynllava_plugin.evaluation.engine.engine import Engine
    from dynllava_plugin.evaluation.engine.requests import Generation
    from dynllava_plugin.evaluation.results.identity import resolve_checkpoint, source_digest
    from dynllava_plugin.evaluation.results.journal import Journal, entry_key

    asked = {key: value for key, value in settings.to_dict().items() if key not in PLACES}
    made_from = [resolve_checkpoint(settings.pretrained), asked, tokens, source_digest()]
    engine, journal = Engine.load(settings, batch_size), Journal(folder)
    requests, keys = [], []
    for item in questions:
        name = f"question {item['question_id']}"
        requests.append(engine.style.request([(item["text"], None)], [item["image"]], name))
        facts = Path(item["image"]).stat()
        keys.append(entry_key("answer", made_from, *item.values(), facts.st_size, facts.st_mtime_ns))
    generation = Generation.from_task({"max_new_tokens": tokens})

    def ask(places: list[int], note: Any) -> Any:
        return engine.generate([requests[place] for place in places], generation, note)

    answers = journal.completed(keys, ask, "dynllava answer")
    return [
        {
            "question_id": item["question_id"], "prompt": item["text"], "text": answer.text, "answer_id": key,
            "model_id": settings.checkpoint_name, "metadata": {name: getattr(answer, name) for name in _COUNTS},
        }
        for item, key, answer in zip(questions, keys, answers, strict=True)
    ]  # fmt: skip
