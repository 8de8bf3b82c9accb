"""Memory of processes: what the system has given to a cache, and pieces of work measured in a process of their own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import torch

from dynllava_plugin.errors import UserError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes(tensors: Iterable[torch.Tensor]) -> int | None:
    """Return the bytes in memory of the mappings that hold `tensors`; None on a GPU and where the system doesn't tell.

    A CPU cache lies in reserved address space, and a page is given when its first slot is written (`sparsity/cache.py`): a short
    sample beside a long one takes what it holds. Pages that were only read are the system's one page of zeros and don't count.
    """
    tensors = list(tensors)
    if any(tensor.device.type != "cpu" for tensor in tensors) or not Path("/proc/self/smaps").exists():
        return None
    starts = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    total = 0
    for mapping in psutil.Process().memory_maps(grouped=False):
        first, last = (int(bound, 16) for bound in mapping.addr.split("-"))
        total += mapping.rss if any(first <= start < last for start in starts) else 0
    return total


def peak_above(work: Callable[[], Any]) -> int | None:
    """Return how many bytes more than now this process holds at the most during `work`; None where only Linux could tell."""
    if not _CLEAR.exists():
        return None
    before = psutil.Process().memory_info().rss
    _CLEAR.write_text("5")  # sets the high-water mark to what is resident now
    work()
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def in_a_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return `call(*arguments)` from a process of its own, which has imported what `call` needs and left no other pages.

    Raises
    ------
    UserError
        The process failed, or was killed: by the system, where memory ran out.
    """
    # Children are forked from one server that imports once and does nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([call.__module__])
    with ProcessPoolExecutor(1, context, _begin, (torch.get_num_threads(),)) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                f"bench: the process of {call.__name__} was killed, as where memory runs out; measure something smaller"
            ) from None
        except Exception as error:
            raise UserError(f"bench: {call.__name__} failed: {type(error).__name__}: {error}") from None
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()  # leaving the pool would wait for its work
            raise


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts speaks to the parent
    torch.set_num_threads(threads)
