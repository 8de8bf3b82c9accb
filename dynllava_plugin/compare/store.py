"""What was measured, one JSON file a policy and share, so that an interrupted comparison goes on and a later one adds rows."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynllava_plugin.compare.answers import Figure
from dynllava_plugin.compare.subjects import Subject
from dynllava_plugin.errors import UserError
from dynllava_plugin.files import write_json


class Store:
    """A folder of measurements.

    Parameters
    ----------
    folder : Path
    made_from : dict
        Checkpoint and whatever else decides a figure; a file made from something else doesn't count.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any]) -> None:
        self.folder, self.made_from = folder, made_from

    def read(self, kind: str, subject: Subject, **of: Any) -> dict[str, Any] | None:
        """What `write` was given for the same arguments, None where there is nothing."""
        path = self._path(kind, subject)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: can't be read ({error}); delete it to measure again") from None
        same = content.get("made_from") == {**self.made_from, **of} and content.get("subject") == asdict(
            subject
        )
        return content if same else None

    def write(self, kind: str, subject: Subject, content: dict[str, Any], **of: Any) -> None:
        """Keep `content`, which came from the arguments `of`."""
        content = {"subject": asdict(subject), "made_from": {**self.made_from, **of}, **content}
        write_json(self._path(kind, subject), content)

    def everything(self, kind: str) -> list[tuple[Subject, dict[str, Any]]]:
        """All that was measured of the same checkpoint."""
        found = []
        for path in sorted((self.folder / kind).glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            made_from = content.get("made_from", {})
            if all(made_from.get(key) == value for key, value in self.made_from.items()):
                found.append((Subject(**content["subject"]), content))
        return found

    def _path(self, kind: str, subject: Subject) -> Path:
        text = subject.policy if subject.keep is None else f"{subject.name}@{subject.keep}"
        plain = re.sub(r"[^\w.=@-]+", "-", text)
        return self.folder / kind / f"{plain}_{hashlib.sha256(text.encode()).hexdigest()[:6]}.json"


def figures_to_json(figures: list[Figure]) -> dict[str, Any]:
    """For `Store.write`."""
    return {"figures": [asdict(figure) for figure in figures]}


def figures_from_json(content: dict[str, Any]) -> list[Figure]:
    """The inverse."""
    return [Figure(**values) for values in content["figures"]]
