"""A JSON list item by item, so that a file of gigabytes costs megabytes of memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError

CHUNK = 1 << 24
# An item of this many characters that still doesn't parse is damage, not a long item.
LONGEST_ITEM = 1 << 27
SPACE = " \t\n\r"


class JsonList:
    """Iterates over the items of a UTF-8 JSON file whose value is a list.

    Raises
    ------
    UserError
        While iterating: no such file, not UTF-8 or not JSON (with the character), or not a list.
    """

    def __init__(self, path: Path, chunk: int = CHUNK) -> None:
        self.path, self.chunk = path, chunk
        self._text, self._at, self._before = "", 0, 0
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        try:
            with self.path.open("rb") as file:
                yield from self._items(file)
        except FileNotFoundError:
            raise UserError(f"--data_path {self.path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data_path {self.path}: not a JSON file ({error})") from None

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
        return UserError(
            f"--data_path {self.path}: not a JSON file ({reason}: character {self._before + self._at})"
        )

    def _not_a_list(self, scan: Any, more: Any) -> UserError:
        if self._text[self._at : self._at + 1] != "{":
            self._item(scan, more)  # names what is wrong where it is no JSON at all
        elif self._text[self._at + 1 :].strip()[:1] not in ('"', "}"):
            return self._damaged("expected a property name")
        return UserError(
            f"--data_path {self.path}: LLaVA's format is a JSON list of samples, this is something else"
        )
