"""easy-VQA's test questions as both harnesses read them: same rows, same order, same prompts, same metric."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from dynllava_plugin.easy_vqa import writing
from dynllava_plugin.errors import UserError
from dynllava_plugin.files import json_lines

BENCHMARKS = ("easy_vqa", "easy_vqa_scenes", "easy_vqa_describe", "easy_vqa_hard")
DATA_VARIABLE = "DYNLLAVA_EASY_VQA"


def data_folder() -> Path:
    """Return where the converted data lies: ``$DYNLLAVA_EASY_VQA``, or the user's cache folder."""
    given = os.environ.get(DATA_VARIABLE)
    if given:
        return Path(given).resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dynllava" / f"easy_vqa-{_converter_version()}"


def _converter_version() -> str:
    """Changes with the converter's source, so that an update never reads what an older one wrote."""
    digest = hashlib.sha256()
    for file in sorted(Path(writing.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def locate_data() -> Path:
    """Return the data's folder; built from the PyPI package ``easy-vqa`` where it isn't there yet.

    Raises
    ------
    UserError
        If ``$DYNLLAVA_EASY_VQA`` names a folder without the data, or ``easy-vqa`` isn't installed.
    """
    folder = data_folder()
    missing = [name for name in BENCHMARKS if not (folder / f"{name}_test.jsonl").is_file()]
    if not missing:
        return folder
    if os.environ.get(DATA_VARIABLE):
        raise UserError(
            f"{DATA_VARIABLE}: {folder} has no {missing[0]}_test.jsonl; "
            f"unset the variable, or run `python train/easy_vqa.py --output_dir {folder}` from a checkout"
        )
    return _build(folder)


def _build(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="easy_vqa-", dir=folder.parent) as temporary:
        target = Path(temporary) / "easy_vqa"
        target.mkdir()
        writing.write_test(target)
        try:
            os.replace(target, folder)
        except OSError:
            # Another process was faster (two harnesses start at once); its copy is the same.
            if not (folder / f"{BENCHMARKS[-1]}_test.jsonl").is_file():
                raise
    return folder


def load_rows(benchmark: str) -> list[dict[str, Any]]:
    """Return the test rows in their fixed, shuffled order, so that the first N are a fixed sample.

    Returns
    -------
    list of dict
        ``id``, ``image`` (absolute path), ``question`` (bare), ``answer``.

    Raises
    ------
    UserError
        For a benchmark that doesn't exist or a file that isn't the converter's.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"{benchmark}: no such easy-VQA benchmark; choose one of {', '.join(BENCHMARKS)}")
    folder = locate_data()
    path = folder / f"{benchmark}_test.jsonl"
    rows = []
    for number, line in json_lines(path):
        try:
            row = json.loads(line)
            row = {key: str(row[key]) for key in ("id", "image", "question", "answer")}
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number}: not a row with id, image, question, answer; build the data again"
            ) from None
        row["image"] = str(folder / row["image"])
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows; build the data again")
    random.Random(0).shuffle(rows)
    return rows


def question_text(benchmark: str, question: str) -> str:
    """Return the question with LLaVA's short-answer instruction where a short answer is wanted."""
    return question if benchmark == "easy_vqa_describe" else question + writing.SHORT_ANSWER


def exact_match(prediction: str, answer: str) -> float:
    """Return 1.0 where the short answers agree but for case, surrounding space and a final period; else 0.0."""
    return float(_plain(prediction) == _plain(answer))


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".").strip()
