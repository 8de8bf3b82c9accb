"""Parts of the demo: run as a command, and marked when done so that a rerun can leave them out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import saved_json, write_json
from dynllava_plugin.processes import run

ROOT = Path(__file__).resolve().parents[2]
MARKER = "done.json"
# glibc would hand large buffers back to the kernel after every step and fault them in again.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


class PartFailed(Exception):
    """A part of the demo ended with an error; the message says which and why."""


def call(command: list[str], what: str, environment: dict[str, str] | None = None) -> None:
    """Run a command with its output shown; `PartFailed` with `what` where it ends with an error."""
    if code := run(command, environment={"HF_HUB_OFFLINE": "1", **(environment or {})}, cwd=ROOT):
        raise PartFailed(f"{what} ended with {code}; its message is above")


def is_done(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether `folder` holds a finished part that was made from the same."""
    return saved_json(folder / MARKER) == made_from


def mark_done(folder: Path, made_from: dict[str, Any]) -> None:
    """Leave the marker that `is_done` reads."""
    write_json(folder / MARKER, made_from)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    if not path.is_file():
        raise UserError(f"{path} doesn't exist; run the demo again with --fresh")
    return hashlib.sha256(path.read_bytes()).hexdigest()
