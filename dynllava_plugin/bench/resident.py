"""How much memory the system has really given to a cache on the CPU.

A CPU cache lies in reserved address space: a page is given when its first slot is written (see `sparsity/buffers.py`), so that a
short sample beside a long one takes what it holds, not what the rectangle around both would.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import torch


def resident_bytes(tensors: Iterable[torch.Tensor]) -> int | None:
    """Bytes of the pages behind `tensors` that are in memory (Linux's `mincore`); None where that can't be asked."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    page, total = mmap.PAGESIZE, 0
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return None
        storage = tensor.untyped_storage()
        start = storage.data_ptr() // page * page
        size = -(-(storage.data_ptr() + storage.nbytes() - start) // page) * page
        seen = (ctypes.c_ubyte * (size // page))()
        if mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), seen) != 0:
            return None
        total += page * int((torch.frombuffer(seen, dtype=torch.uint8) & 1).sum())
    return total
