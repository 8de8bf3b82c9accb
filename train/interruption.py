"""SIGTERM as a request to save and stop, for schedulers that warn before they take a node away.

Launchers and schedulers signal whole process groups: the processes that load data hear of it too, and leave the
decision to the process that trains.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
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


class ShieldedWorker:
    """A DataLoader's `worker_init_fn` under which SIGTERM ends a worker only where its own rank sends it.

    One that died of a group's SIGTERM would take its rank with it, before that has saved.

    Parameters
    ----------
    then : callable, optional
        The `worker_init_fn` to go on with.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        # Ignored altogether, it would leave Python's exit waiting for workers that it has told to end.
        if hasattr(signal, "sigwaitinfo"):  # not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_wait_for_rank, daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _wait_for_rank() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
