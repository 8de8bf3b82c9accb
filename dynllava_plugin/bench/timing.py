"""Clocks and memory of a device, and interleaved repeats.

`torch.utils.benchmark.Timer` runs what it times twice more for warmth and one piece of work after the other: a step that
fills a cache may run once only, and a slow minute of the machine would make one of them slow.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from dynllava_plugin.environment import free_bytes
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints.placement import find_device

Key = TypeVar("Key", bound=Hashable)


def place(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype, dict[str, Any]]:
    """Return the device, the GPU by default where there is one, the data type, and what every row says of where it was measured.

    Raises
    ------
    UserError
        A device that isn't here or that there is no clock for, or a data type that models aren't run in.
    """
    found = find_device(device)
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {device!r}; the benchmark knows cpu and cuda")
    name = dtype or ("float32" if found.type == "cpu" else "bfloat16")
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype: {name!r} is not one of float32, bfloat16, float16")
    called = torch.cuda.get_device_name(found) if found.type == "cuda" else "cpu"
    return found, getattr(torch, name), {"device": called, "dtype": name, "threads": torch.get_num_threads()}


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long `call` takes, by CUDA events or the monotonic clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):  # events are recorded on the current device's stream
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    calls: Mapping[Key, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    warmup: int = 1,
    before: Callable[[Key], None] = lambda key: None,
) -> dict[Key, list[float]]:
    """Return the seconds of each call, `repeats` times, the calls taking turns so that a slow minute slows all of them.

    `before(key)` makes ready for a call and isn't timed.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls)
    for turn in range(-warmup, repeats):
        # Each goes first in its turn: what the one before leaves in the caches is nobody's lasting advantage.
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            before(key)
            taken = seconds(calls[key], device)
            times[key] += [taken] if turn >= 0 else []
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Return median, extremes and interquartile range, in seconds."""
    quarter = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "iqr_s": quarter[2] - quarter[0],
        "repeats": len(times),
    }


def require_memory(needed: float, device: torch.device, what: str) -> None:
    """Raise `UserError` for what can't fit into free memory, `needed` bytes, before anything is allocated."""
    free = free_bytes(device)
    if needed > free:
        raise UserError(
            f"{what}: needs about {needed / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB free; "
            "take a smaller --shape, --batch or --new-tokens"
        )


def release(device: torch.device) -> None:
    """Give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_allocated(work: Callable[[], Any], device: torch.device) -> int:
    """Return the allocator's peak in bytes while a GPU does `work`."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
