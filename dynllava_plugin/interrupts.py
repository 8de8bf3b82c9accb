"""Ctrl-C ends a command with one line. An entry point imports this first: what it imports next may take seconds."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

_before = sys.excepthook
_interrupted = False


def _note(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not _interrupted:
        return _before(kind, error, trace)
    print("stopped", file=sys.stderr, flush=True)
    if not issubclass(kind, KeyboardInterrupt):  # a library that was being imported made something else of it
        os._exit(130)  # as a shell reads Python's own end by the signal


sys.excepthook = _tell
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _note)
