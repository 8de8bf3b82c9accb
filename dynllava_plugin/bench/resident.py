"""How much memory the system has really given to a cache on the CPU.

A CPU cache lies in reserved address space: a page is given when its first slot is written (see `sparsity/cache.py`), so that a
short sample beside a long one takes what it holds, not what the rectangle around both would.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

_RANGE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
_RSS = re.compile(r"^Rss:\s+(\d+) kB")


def resident_bytes(tensors: Iterable[torch.Tensor]) -> int | None:
    """Bytes in memory of the mappings that hold `tensors` (Linux's smaps); None where that isn't told.

    Pages that were only read don't count: they are all the system's one page of zeros.
    """
    starts = []
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return None
        starts.append(tensor.untyped_storage().data_ptr())
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    total, inside = 0, False
    for line in lines:
        if found := _RANGE.match(line):
            first, last = (int(bound, 16) for bound in found.groups())
            inside = any(first <= start < last for start in starts)
        elif inside and (found := _RSS.match(line)):
            total += int(found[1]) * 1024
    return total
