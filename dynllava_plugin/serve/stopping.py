"""Stop texts of an answer that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Let text through up to the first stop text; what may be the beginning of one waits for the next piece."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.held, self.stopped = texts, "", False

    def feed(self, piece: str) -> str:
        """Return what can go out after `piece`."""
        if self.stopped:
            return ""
        text = self.held + piece
        cut = self.cut(text)
        if cut != text:
            self.held, self.stopped = "", True
            return cut
        waiting = max((_overlap(text, stop) for stop in self.texts), default=0)
        self.held = text[len(text) - waiting :]
        return text[: len(text) - waiting]

    def rest(self) -> str:
        """Return what waited when the answer ended."""
        rest, self.held = self.held, ""
        return rest

    def cut(self, text: str) -> str:
        """Return a whole `text` up to the first stop text."""
        places = [text.find(stop) for stop in self.texts]
        return text[: min((place for place in places if place >= 0), default=len(text))]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
