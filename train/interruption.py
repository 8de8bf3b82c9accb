"""SIGTERM as a request to save and stop, for schedulers that warn before they take a node away."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interruption:
    """While entered, SIGTERM sets `requested` and the process goes on.

    Attributes
    ----------
    requested : bool
        This process was asked to stop.
    """

    EXIT_CODE = 128 + signal.SIGTERM

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
