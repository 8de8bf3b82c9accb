"""LLaVA's JSON mixture: reading it, checking all of it before training, and finding its images."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import IMAGE_TOKEN, with_images


@dataclass(frozen=True)
class Sample:
    """One conversation about one or more images.

    Attributes
    ----------
    name : str
        How errors call it: its place in the file and its id.
    images : tuple of str
        Paths relative to the image folder, in the order of the `<image>` markers.
    turns : tuple of (question, answer)
        Questions carry their `<image>` markers in front, one a line.
    """

    name: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


def read_samples(data_path: str | Path) -> tuple[list[Sample], int]:
    """Read a mixture in LLaVA's JSON format and check every sample.

    Returns
    -------
    samples : list of Sample
        The conversations with at least one image, in file order.
    text_only : int
        How many conversations without an image were left out (the recipe trains on image samples only).

    Raises
    ------
    UserError
        Not a JSON list of conversations, or the first sample that is malformed, by name.
    """
    try:
        rows = json.loads(Path(data_path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--data_path {data_path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--data_path {data_path}: not a JSON file ({error})") from None
    if not isinstance(rows, list):
        raise UserError(
            f"--data_path {data_path}: LLaVA's format is a JSON list of samples, this is a {_kind(rows)}"
        )
    samples = []
    for index, row in enumerate(rows):
        name = f"{data_path}: sample {index}"
        if not isinstance(row, dict):
            raise UserError(f"{name} is a {_kind(row)}, not an object with 'conversations'")
        if "id" in row:
            name += f" (id {row['id']!r})"
        if not isinstance(row.get("conversations"), list):
            raise UserError(f"{name} has no list 'conversations'; LLaVA's samples do")
        if row.get("image"):
            samples.append(_sample(name, row))
        elif _opens_with_image(row["conversations"]):
            raise UserError(f"{name} has an {IMAGE_TOKEN} marker but no 'image'")
    if not samples:
        raise UserError(
            f"--data_path {data_path}: none of its {len(rows)} samples has an 'image' to train on"
        )
    return samples, len(rows) - len(samples)


def _sample(name: str, row: dict[str, Any]) -> Sample:
    images = [row["image"]] if isinstance(row["image"], str) else row["image"]
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise UserError(f"{name}: 'image' must be a file name or a list of file names")
    messages = [_message(name, place, message) for place, message in enumerate(row["conversations"])]
    if messages and messages[0][0] == "gpt":  # LLaVA skips an answer that precedes every question
        messages = messages[1:]
    if not messages or [speaker for speaker, _ in messages] != ["human", "gpt"] * (len(messages) // 2):
        raise UserError(f"{name}: 'conversations' must alternate 'human' and 'gpt' and end with 'gpt'")
    markers = 0
    turns: list[tuple[str, str]] = []
    for (_, question), (_, answer) in zip(messages[::2], messages[1::2], strict=True):
        count = question.count(IMAGE_TOKEN)
        if count:
            question = question.replace(IMAGE_TOKEN, "").strip()
        if not question.strip() or not answer.strip():
            raise UserError(
                f"{name}: turn {len(turns)} has an empty {'answer' if question.strip() else 'question'}"
            )
        if IMAGE_TOKEN in answer:
            raise UserError(f"{name}: turn {len(turns)} has an {IMAGE_TOKEN} marker in its answer")
        markers += count
        turns.append((with_images(question, count), answer))
    if markers != len(images):
        raise UserError(
            f"{name} has {markers} {IMAGE_TOKEN} markers in its questions but {len(images)} images"
        )
    return Sample(name, tuple(images), tuple(turns))


def _opens_with_image(messages: list[Any]) -> bool:
    """Whether a conversation's first line means an image; elsewhere in a text it may be anybody's markup."""
    value = messages[0].get("value") if messages and isinstance(messages[0], dict) else None
    return isinstance(value, str) and (value.startswith(IMAGE_TOKEN) or value.endswith("\n" + IMAGE_TOKEN))


def _message(name: str, place: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise UserError(f"{name}: message {place} is not an object with 'from' and a string 'value'")
    if message.get("from") not in ("human", "gpt"):
        raise UserError(f"{name}: message {place} is from {message.get('from')!r}, neither 'human' nor 'gpt'")
    return message["from"], message["value"]


def check_images(samples: list[Sample], image_folder: str | Path) -> None:
    """Find missing images before training, by listing each sub-folder once instead of opening every file.

    Raises
    ------
    UserError
        With the number missing per sub-folder and the first few names.
    """
    folder = Path(image_folder)
    if not folder.is_dir():
        raise UserError(f"--image_folder {image_folder}: no such folder")
    listed: dict[str, set[str]] = {}
    wanted: Counter[str] = Counter()
    missing: dict[str, list[str]] = {}
    for image in dict.fromkeys(image for sample in samples for image in sample.images):
        parent, file_name = os.path.split(image)
        if parent not in listed:
            path = folder / parent
            listed[parent] = set(os.listdir(path)) if path.is_dir() else set()
        wanted[parent] += 1
        if file_name not in listed[parent]:
            missing.setdefault(parent, []).append(image)
    if missing:
        groups = [f"{len(names)} of {wanted[parent]} in {parent or '.'}" for parent, names in missing.items()]
        counts = ", ".join(groups[:5]) + (", ..." if len(groups) > 5 else "")
        names = [name for group in missing.values() for name in group]
        raise UserError(
            f"--image_folder {image_folder}: {len(names)} images are missing ({counts}), "
            f"first: {', '.join(names[:3])}; needed by {_first_user(samples, names[0])}"
        )


def _first_user(samples: list[Sample], image: str) -> str:
    return next(sample.name for sample in samples if image in sample.images)


def _kind(value: Any) -> str:
    names = {dict: "JSON object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
