"""`dynllava bench train`: the training attention and a whole training step, against the full-matrix implementation.

Peak memory is the allocator's on a GPU. On a CPU each piece runs in a process of its own and it is what that holds at the most
above what it held before, when it had run a small piece of the same kind, which loads libraries and starts threads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dynllava_plugin.bench.attention import IMPLEMENTATIONS, AttentionCase
from dynllava_plugin.bench.process import in_a_process, peak_above
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.shapes import shape_named
from dynllava_plugin.bench.timing import (
    interleaved,
    peak_allocated,
    place,
    release,
    require_memory,
    summary,
)
from dynllava_plugin.bench.train_step import Step, StepSettings, epoch_hours, peak_flops
from dynllava_plugin.environment import free_bytes


def run(args: argparse.Namespace) -> int:
    """Measure a row for each implementation; return 130 where the user interrupts, with the rows so far kept."""
    device, dtype, here = place(args.device, args.dtype)
    on_cpu = device.type == "cpu"
    name = args.shape or ("cpu-medium" if on_cpu else "llava-1.5-7b")
    shape = shape_named(name)
    checkpointing = not on_cpu if args.checkpointing is None else args.checkpointing
    batch = args.batch or (4 if on_cpu else 8)
    settings = StepSettings(shape, str(device), dtype, batch, args.text_tokens, checkpointing, args.optimizer)
    if "step" in args.only:
        require_memory(settings.needed_bytes, device, f"--shape {name} --optimizer {args.optimizer}")
    rows = Rows.of(args, {"shape": name, **here}, "implementation")
    samples, width = args.batch or (1 if on_cpu else 8), shape.hidden // shape.heads
    one = AttentionCase(1, samples, shape.heads, shape.kv_heads, width, dtype, device=str(device))

    def work() -> None:
        for length in args.lengths if "attention" in args.only else ():
            for kept in args.kept:
                _attention(rows, replace(one, length=length, kept=kept), device, args.repeats)
        if "step" in args.only:
            _step(rows, settings, device, args)

    return rows.carry_out(work, args.output)


def peak(case: AttentionCase | StepSettings, implementation: str) -> int | None:
    """Return the bytes that a piece of training holds at the most beside what was there before; None where they can't be told."""
    if case.device == "cpu":
        return in_a_process(cpu_peak, case, implementation)
    work = case.work(implementation)
    before = torch.cuda.memory_allocated(case.device)
    return peak_allocated(work, torch.device(case.device)) - before


def cpu_peak(case: AttentionCase | StepSettings, implementation: str) -> int | None:
    """Return the same of this process."""
    case.small().work(implementation)()
    return peak_above(case.work(implementation))


def _attention(rows: Rows, case: AttentionCase, device: torch.device, repeats: int) -> None:
    release(device)
    asked, free = case.batch, free_bytes(device)
    while case.plain_bytes > free and case.batch > 1:  # the plain one must fit beside ours
        case = replace(case, batch=case.batch // 2)
    about = {"phase": "attention", "kept": case.kept, "batch": case.batch, "length": case.length}
    names = list(IMPLEMENTATIONS)
    if rows.has({**about, "implementation": name} for name in names):
        return
    if case.batch != asked:
        text = f"the full matrix of {asked} samples of {case.length} tokens does not fit"
        print(f"batch {case.batch}: {text}", file=sys.stderr)
    if case.plain_bytes > free:
        rows.add(**about, implementation="plain", fits=False)
        names.remove("plain")
    times = interleaved({name: case.work(name) for name in names}, device, repeats)
    release(device)
    _add(rows, about, times, {name: peak(case, name) for name in names})


def _step(rows: Rows, settings: StepSettings, device: torch.device, args: argparse.Namespace) -> None:
    about = {"phase": "step", "kept": "paper", "batch": settings.batch, "length": settings.length}
    names = ["plain", "ours"]
    if rows.has({**about, "implementation": name} for name in names):
        return
    release(device)
    most, most_from = peak_flops(device, settings.dtype, args.peak_tflops)
    step = Step(settings)
    times = interleaved({name: partial(step, name) for name in names}, device, args.repeats)
    del step
    release(device)
    about |= {
        "checkpointing": settings.checkpointing, "optimizer": settings.optimizer, "model_tflops": settings.flops / 1e12,
        "peak_tflops": most / 1e12, "peak_from": most_from, "devices": args.devices,
    }  # fmt: skip
    _add(rows, about, times, {name: peak(settings, name) for name in names}, settings)


def _add(
    rows: Rows,
    about: dict[str, Any],
    times: dict[str, list[float]],
    peaks: dict[str, int | None],
    settings: StepSettings | None = None,
) -> None:
    """Add a row for each implementation, with its ratios to the plain one, and its speed if it is a step."""
    base, base_peak = times.get("plain"), peaks.get("plain")
    for name, taken in times.items():
        found, held = summary(taken), peaks[name]
        median = found["median_s"]
        speed: dict[str, Any] = {}
        if settings is not None:
            rate = settings.batch / median
            speed = {
                "samples_per_s": rate, "tokens_per_s": rate * settings.length,
                "mfu": about["model_tflops"] / median / about["peak_tflops"],
                "epoch_hours": [epoch_hours(rate, devices) for devices in about["devices"]],
            }  # fmt: skip
        rows.add(
            **about, implementation=name, **found, fits=True, peak_bytes=held,
            time_ratio=median / summary(base)["median_s"] if base else None,
            memory_ratio=held / base_peak if base_peak and held is not None else None, **speed,
        )  # fmt: skip
