"""Buffers [B, H, slots, D] that grow at the end of every row.

On the CPU a buffer lies in reserved address space: the system gives memory page by page as slots are written, so that growing
copies nothing until the reservation is used up. On other devices growing makes a larger buffer and copies.
"""

from __future__ import annotations

import mmap

import torch

RESERVE = 4096  # slots beyond those asked for


def zeros(like: torch.Tensor, slots: int) -> torch.Tensor:
    """A zero buffer [B, H, slots, D] with the batch, heads, width, dtype and device of `like` [B, H, any, D]."""
    batch, heads, _, width = like.shape
    reserved = _reserved(like, (batch, heads, slots + RESERVE, width)) if like.device.type == "cpu" else None
    # Zeros, because an unused slot's weight of 0 times a stray NaN would still be NaN.
    return like.new_zeros(batch, heads, slots, width) if reserved is None else reserved[:, :, :slots]


def grown(buffer: torch.Tensor, slots: int) -> torch.Tensor:
    """`buffer` made by `zeros` or contiguous, with `slots` slots: the same memory where there is room behind each row."""
    batch, heads, held, width = buffer.shape
    if slots <= buffer.stride(1) // width:
        return buffer.as_strided((batch, heads, slots, width), buffer.stride())
    larger = zeros(buffer, slots)
    larger[:, :, :held] = buffer
    return larger


def _reserved(like: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor | None:
    """Zeros in address space of their own; None where the system gives none."""
    size = torch.Size(shape).numel()
    if not hasattr(mmap, "MAP_ANONYMOUS") or not size:
        return None
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        space = mmap.mmap(-1, size * like.element_size(), flags=flags)
    except (OSError, ValueError):
        return None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        try:
            space.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would be given whole for its first slot
        except OSError:
            pass
    return torch.frombuffer(space, dtype=like.dtype).view(shape)
