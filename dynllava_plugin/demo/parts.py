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


def make(
    folder: Path, title: str, command: list[str], made_from: dict[str, Any], environment: dict[str, str]
) -> Path:
    """Return `folder` once `command` has made it; nothing is run where it was made from the same before.

    Parameters
    ----------
    title : str
        What is done, behind the part's name: ``data: easy-VQA's images``.
    made_from : dict
        All that decides what is made, for JSON.

    Raises
    ------
    PartFailed
        If the command ends with an error.
    """
    part = title.partition(":")[0]
    if saved_json(folder / MARKER) == made_from:
        print(f"{part}: done before")
        return folder
    print(title, flush=True)
    if code := run(command, environment={"HF_HUB_OFFLINE": "1", **environment}, cwd=ROOT):
        raise PartFailed(f"{part} ended with {code}; its message is above")
    write_json(folder / MARKER, made_from)
    return folder


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    if not path.is_file():
        raise UserError(f"{path} doesn't exist; run the demo again with --fresh")
    return hashlib.sha256(path.read_bytes()).hexdigest()
