"""LLaVA's JSON format, read as training and the generation sets read it: an item of the list at a time, checked."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import IMAGE_TOKEN, with_images

CHUNK = 1 << 24
# An item of this many characters that still doesn't parse is damage, not a long item.
LONGEST_ITEM = 1 << 27
SPACE = " \t\n\r"


@dataclass(frozen=True)
class Sample:
    """One conversation about no, one or more images.

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


def read_sample(name: str, row: Any) -> Sample:
    """Return a sample from its JSON value.

    Raises
    ------
    UserError
        It is malformed; the message names it.
    """
    if not isinstance(row, dict):
        raise UserError(f"{name} is a {json_kind(row)}, not an object with 'conversations'")
    if not isinstance(row.get("conversations"), list):
        raise UserError(f"{name} has no list 'conversations'; LLaVA's samples do")
    if not row.get("image") and opens_with_image(row["conversations"]):
        raise UserError(f"{name} has an {IMAGE_TOKEN} marker but no 'image'")
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
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
    try:
        "".join([*images, *(text for turn in turns for text in turn)]).encode()
    except UnicodeEncodeError as error:
        odd = error.object[error.start]
        raise UserError(
            f"{name} has {odd!r}, half of a character, which no tokenizer takes; mend it"
        ) from None
    return Sample(name, tuple(images), tuple(turns))


def image_names(row: Any) -> list[str]:
    """Return the images that an item of the list names, malformed or not."""
    images = row.get("image") if isinstance(row, dict) else None
    return [
        name for name in (images if isinstance(images, list) else [images]) if isinstance(name, str) and name
    ]


def json_kind(value: Any) -> str:
    """Return what JSON calls a value."""
    names = {dict: "JSON object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def opens_with_image(messages: list[Any]) -> bool:
    """Whether a conversation's first line means an image; elsewhere in a text it may be anybody's markup."""
    value = messages[0].get("value") if messages and isinstance(messages[0], dict) else None
    return isinstance(value, str) and (value.startswith(IMAGE_TOKEN) or value.endswith("\n" + IMAGE_TOKEN))


def _message(name: str, place: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise UserError(f"{name}: message {place} is not an object with 'from' and a string 'value'")
    if message.get("from") not in ("human", "gpt"):
        raise UserError(f"{name}: message {place} is from {message.get('from')!r}, neither 'human' nor 'gpt'")
    return message["from"], message["value"]


class JsonList:
    """Iterates over the items of a UTF-8 JSON file whose value is a list, so that gigabytes of file cost megabytes of memory.

    Parameters
    ----------
    flag : str
        What the file was given as, for error messages.
    chunk : int
        Bytes that are read at once.

    Raises
    ------
    UserError
        While iterating: no such file, not UTF-8 or not JSON (with the character), or not a list.
    """

    def __init__(self, path: Path, flag: str = "", chunk: int = CHUNK) -> None:
        self.path, self.chunk = path, chunk
        self._name = f"{flag} {path}".strip()
        self._text, self._at, self._before = "", 0, 0
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        try:
            with self.path.open("rb") as file:
                yield from self._items(file)
        except FileNotFoundError:
            raise UserError(f"{self._name}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._name}: not a JSON file ({error})") from None

    def _items(self, file: Any) -> Iterator[Any]:
        decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        scan = json.JSONDecoder().raw_decode

        def more() -> bool:
            data = file.read(max(self.chunk, len(self._text) - self._at))
            self._before += self._at
            self._text, self._at = self._text[self._at :] + decode(data, final=not data), 0
            self._ended = not data
            return bool(data)

        more()
        if self._next(more) != "[":
            raise self._not_a_list(scan, more)
        self._at += 1
        if self._next(more) != "]":
            while True:
                yield self._item(scan, more)
                mark = self._next(more)
                self._at += 1
                if mark == "]":
                    break
                if mark != ",":
                    self._at -= 1
                    raise self._damaged("expected ',' or ']'")
                self._next(more)
        else:
            self._at += 1
        if self._next(more):
            raise self._damaged("something follows the list")

    def _next(self, more: Any) -> str:
        """The next character that is no space, "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not more():
                return ""

    def _item(self, scan: Any, more: Any) -> Any:
        while True:
            try:
                value, end = scan(self._text, self._at)
                # A number may go on behind the text read so far.
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended or len(self._text) - self._at > LONGEST_ITEM:
                    self._at = error.pos
                    raise self._damaged(error.msg) from None
            more()

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self._name}: not a JSON file ({reason}: character {self._before + self._at})")

    def _not_a_list(self, scan: Any, more: Any) -> UserError:
        if self._text[self._at : self._at + 1] != "{":
            self._item(scan, more)  # names what is wrong where it is no JSON at all
        elif self._text[self._at + 1 :].strip()[:1] not in ('"', "}"):
            return self._damaged("expected a property name")
        return UserError(f"{self._name}: LLaVA's format is a JSON list of samples, this is something else")
