"""Conversations about an image in LLaVA's JSON format, as LVIS-Instruct4V and ShareGPT4V ship them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import IMAGE_TOKEN


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
    """Return the file's conversations, and a line for each entry that isn't one.

    Raises
    ------
    UserError
        If the file can't be read or isn't a JSON list.
    """
    found, broken = [], []
    for number, entry in enumerate(_entries(path)):
        try:
            found.append(_conversation(entry, number))
        except ValueError as error:
            name = entry.get("id", number) if isinstance(entry, dict) else number
            broken.append(f"entry {number} (id {name}): {error}")
    return found, broken


def image_names(path: Path) -> set[str]:
    """Return the file names, without folders, of all images in a training mixture."""
    entries = [entry for entry in _entries(path) if isinstance(entry, dict)]
    return {Path(str(entry["image"])).name for entry in entries if entry.get("image")}


def _entries(path: Path) -> Iterator[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of conversations")
    yield from content


def _conversation(entry: Any, number: int) -> Conversation:
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    image, messages = entry.get("image"), entry.get("conversations")
    if not isinstance(image, str) or not image:
        raise ValueError("no image")
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise ValueError("questions and answers don't come in pairs")
    texts = []
    for place, message in enumerate(messages):
        wanted = ("human", "gpt")[place % 2]
        if not isinstance(message, dict) or message.get("from") != wanted:
            raise ValueError(f"message {place} isn't from {wanted!r}")
        text = message.get("value")
        text = text.replace(IMAGE_TOKEN, "").strip() if isinstance(text, str) else ""
        if not text:
            raise ValueError(f"message {place} is empty")
        texts.append(text)
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Conversation(str(entry.get("id", number)), image, pairs)
