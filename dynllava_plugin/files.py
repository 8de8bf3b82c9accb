"""Files that appear whole or not at all."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError, one_line


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def json_lines(path: Path) -> list[tuple[int, str]]:
    """Return number and text of a JSON Lines file's lines that aren't empty.

    They end at newlines only: `str.splitlines` cuts at U+2028 and the like too, which JSON leaves as they are inside of strings.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_json(path: Path, advice: str = "replace it") -> dict[str, Any]:
    """Return a JSON object from a file; `UserError` names the file, what is wrong with it and, as `advice`, what to do."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({one_line(error)}); {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; {advice}")
    return content


def saved_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that was written here; empty where there is none, or it is damaged."""
    try:
        return read_json(path)
    except UserError:
        return {}


def leaves(folder: Path, name: str) -> bool:
    """Return whether the path `name`, taken from `folder`, ends outside of it: upwards, absolute, or through a link."""
    inside = os.path.realpath(folder)
    return os.path.commonpath([inside, os.path.realpath(os.path.join(inside, name))]) != inside


def check_folder(flag: str, folder: Path) -> None:
    """`UserError` that names `flag` where nothing could be written into `folder`; it isn't made if it isn't there."""
    place = folder.absolute()
    try:
        while not (place.exists() or place.is_symlink()) and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        raise UserError(f"{flag} {folder}: can't be written ({error.strerror or error})") from None


def check_file(flag: str, file: Path) -> None:
    """`UserError` that names `flag` where `file` couldn't be written; nothing is made."""
    if file.is_dir():
        raise UserError(f"{flag} {file}: is a folder; name a file")
    try:
        check_folder(flag, file.parent)
    except UserError as error:
        raise UserError(str(error).replace(f"{flag} {file.parent}:", f"{flag} {file}:", 1)) from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_figure(path: Path, figure: Any, dpi: int = 150) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    content = io.BytesIO()
    try:
        figure.savefig(content, format="png", dpi=dpi)
    finally:
        plt.close(figure)
    write_bytes(path, content.getvalue())
