"""One writer a folder, also where the writer's parent is gone; and an end by SIGTERM that leaves nobody behind."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError


@contextmanager
def locks(folders: set[Path], writer: str) -> Iterator[dict[Path, int]]:
    """Hold each folder for this process, and for those that are given its file descriptor.

    Parameters
    ----------
    writer : str
        Who else may hold one, for the error.

    Yields
    ------
    dict of Path to int
        Each folder's descriptor: a lock lasts until the last process that has it open ends.

    Raises
    ------
    UserError
        If another process holds one, or a folder can't be written.
    """
    with ExitStack() as stack:
        files = {}
        try:
            for folder in sorted(folders):
                folder.mkdir(parents=True, exist_ok=True)
                files[folder] = stack.enter_context((folder / ".lock").open("w"))
                fcntl.flock(files[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: {writer} is writing there") from None
        except OSError as error:
            raise UserError(f"{error.filename}: can't be written ({error.strerror})") from None
        yield {folder: file.fileno() for folder, file in files.items()}


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: what is running is ended first. Elsewhere than in the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
