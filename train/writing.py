"""Small files that a run writes: a disk that is full or gone is one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynllava_plugin.errors import UserError


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Turn an `OSError` within into a `UserError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room, then give the same command again "
            "to go on"
        ) from error
