"""Child processes: commands of ours and of the harnesses, with what they print in a file or shown."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

Process = subprocess.Popen[bytes]


def start(command: Sequence[str], log: Path | None = None, environment: Any = None, **more: Any) -> Process:
    """Start a command; return its process.

    Parameters
    ----------
    command : sequence of str
    log : Path, optional
        What both its outputs are appended to; shown where None.
    environment : mapping, optional
        Variables beside this process's own.
    more
        Of `subprocess.Popen`.
    """
    with log.open("ab") if log else nullcontext() as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT if file else None,
            env={**os.environ, **(environment or {})},
            **more,
        )


def run(command: Sequence[str], log: Path | None = None, environment: Any = None, **more: Any) -> int:
    """Run what `start` starts to its end, and end it where this process is interrupted; return its exit status."""
    with start(command, log, environment, **more) as process:
        try:
            return process.wait()
        except BaseException:
            process.kill()
            raise
