"""What was measured, a JSON file each benchmark, policy and budget: an interrupted comparison goes on, a later one adds rows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynllava_plugin.compare.subjects import Subject
from dynllava_plugin.errors import UserError
from dynllava_plugin.files import read_json, write_json


class Store:
    """A folder of measurements.

    Parameters
    ----------
    made_from : dict
        Checkpoint and whatever else decides a figure; a file made from something else doesn't count.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any]) -> None:
        self.folder, self.made_from = folder, made_from

    def read(self, kind: str, subject: Subject, **of: Any) -> dict[str, Any] | None:
        """Return what `write` was given for the same arguments, None where there is nothing."""
        path = self._path(kind, subject, "json")
        content = read_json(path) if path.is_file() else {}
        same = content.get("made_from") == self._from(subject, of)
        return content if same and content["subject"] == asdict(subject) else None

    def write(self, kind: str, subject: Subject, content: dict[str, Any], **of: Any) -> None:
        """Keep `content`, which came from the arguments `of`."""
        content = {"subject": asdict(subject), "made_from": self._from(subject, of), **content}
        write_json(self._path(kind, subject, "json"), content)

    def everything(self, kind: str) -> list[tuple[Subject, dict[str, Any]]]:
        """Return all that was measured of the same checkpoint, by policies as they are written now."""
        found = []
        for path in sorted((self.folder / kind).glob("*.json")):
            content = read_json(path)
            made_from = content.get("made_from", {})
            if not all(made_from.get(key) == value for key, value in self.made_from.items()):
                continue
            subject = Subject(**content["subject"])
            with contextlib.suppress(UserError):  # a policy or argument that is no more
                if made_from.get("code") == subject.code:
                    found.append((subject, content))
        return found

    def journal(self, kind: str, subject: Subject, **of: Any) -> Path:
        """Return the folder for the answers of a measurement that isn't done, another one wherever an answer may differ."""
        made_from = json.dumps(self._from(subject, of), sort_keys=True)
        return self._path(kind, subject, f"journal-{_digits(made_from)}")

    def _from(self, subject: Subject, of: dict[str, Any]) -> dict[str, Any]:
        return {**self.made_from, "code": subject.code, **of}

    def _path(self, kind: str, subject: Subject, ending: str) -> Path:
        plain = re.sub(r"[^\w.=@-]+", "-", subject.policy)
        made_from = json.dumps(self.made_from, sort_keys=True)
        return self.folder / kind / f"{plain}_{_digits(made_from + subject.policy + str(subject))}.{ending}"


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
