"""One conversation of LLaVA's JSON format, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import IMAGE_TOKEN, with_images


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
