"""Clocks and memory of a device, and interleaved repeats."""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from dynllava_plugin.environment import free_bytes
from dynllava_plugin.errors import UserError

Key = TypeVar("Key", bound=Hashable)


def find_device(name: str | None) -> torch.device:
    """Return a device that is here, by default the GPU where there is one, or raise `UserError`."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: {name!r} is not a device (cpu, cuda, cuda:0, ...)") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device: {name!r} asked for, but PyTorch sees no GPU here")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device: {name!r} asked for, but there are {torch.cuda.device_count()} GPUs")
    elif device.type != "cpu":
        raise UserError(f"--device: {name!r}; the benchmark knows cpu and cuda")
    return device


def dtype_named(name: str | None, device: torch.device) -> torch.dtype:
    """Return a data type by name; by default float32 on a CPU and bfloat16 elsewhere."""
    name = name or ("float32" if device.type == "cpu" else "bfloat16")
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype: {name!r} is not one of float32, bfloat16, float16")
    return getattr(torch, name)


def about_here(device: torch.device, dtype: str | None) -> dict[str, Any]:
    """Return what every row of a run says of where it was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype_named(dtype, device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long `call` takes, by CUDA events or the monotonic clock."""
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
    """Seconds of each call, `repeats` times, the calls taking turns so that a slow minute slows all of them.

    `before(key)` makes ready for a call and isn't timed.
    """
    for key, call in calls.items():
        for _ in range(warmup):
            before(key)
            call()
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls)
    for turn in range(repeats):
        # Each goes first in its turn: what the one before leaves in the caches is nobody's lasting advantage.
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            before(key)
            times[key].append(seconds(calls[key], device))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, extremes and interquartile range, in seconds."""
    quarter = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "iqr_s": quarter[2] - quarter[0],
        "repeats": len(times),
    }


def require_memory(needed: float, device: torch.device, what: str) -> None:
    """Refuse what can't fit, before anything is allocated."""
    free = free_bytes(device)
    if needed > free:
        raise UserError(
            f"{what}: needs about {needed / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB free; "
            "take a smaller --shape, --batch or --new-tokens"
        )


def require_disk(needed: float, folder: Path) -> None:
    """Refuse a checkpoint that the disk can't hold."""
    free = shutil.disk_usage(folder).free
    if needed * 1.1 > free:
        raise UserError(
            f"load: needs {needed / 2**30:.1f} GiB in {folder}, which has {free / 2**30:.1f} GiB free; set TMPDIR"
        )


def release(device: torch.device) -> None:
    """Give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
