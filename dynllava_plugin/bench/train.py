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

from dynllava_plugin.bench.attention import IMPLEMENTATIONS, AttentionShape, attention_inputs
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
    one = AttentionShape(
        1, args.batch or (1 if on_cpu else 8), shape.heads, shape.kv_heads, shape.hidden // shape.heads, dtype
    )

    def work() -> None:
        for length in args.lengths if "attention" in args.only else ():
            for kept in args.kept:
                _attention(rows, replace(one, length=length), kept, device, args.repeats)
        if "step" in args.only:
            _step(rows, settings, device, args)

    return rows.carry_out(work, args.output)


def attention_peak(shape: AttentionShape, kept: str, implementation: str, device: torch.device) -> int | None:
    """Return the bytes above the inputs: output, gradients and everything between; None where they can't be told."""
    if device.type == "cpu":
        return in_a_process(cpu_attention_peak, shape, kept, implementation)
    inputs = attention_inputs(shape, kept, device)
    before = torch.cuda.memory_allocated(device)
    return peak_allocated(lambda: IMPLEMENTATIONS[implementation](inputs), device) - before


def cpu_attention_peak(shape: AttentionShape, kept: str, implementation: str) -> int | None:
    """Return the same of this process."""
    attend = IMPLEMENTATIONS[implementation]
    attend(attention_inputs(replace(shape, length=min(shape.length, 64)), kept, "cpu"))
    inputs = attention_inputs(shape, kept, "cpu")
    return peak_above(lambda: attend(inputs))


def step_peak(settings: StepSettings, implementation: str, step: Step | None) -> int | None:
    """Return the bytes that a step holds: weights, gradients, optimiser states, activations. `step` is the GPU's, built already."""
    if step is None:
        return in_a_process(cpu_step_peak, settings, implementation)
    step(implementation)
    return peak_allocated(lambda: step(implementation), torch.device(settings.device))


def cpu_step_peak(settings: StepSettings, implementation: str) -> int | None:
    """Return the same of this process."""
    Step(replace(settings, batch=1, shape=replace(settings.shape, layers=3, vocab=64)))(implementation)

    def two_steps() -> None:
        step = Step(settings)
        step(implementation)  # makes the optimiser's states
        step(implementation)

    return peak_above(two_steps)


def _attention(rows: Rows, shape: AttentionShape, kept: str, device: torch.device, repeats: int) -> None:
    release(device)
    asked, free = shape.batch, free_bytes(device)
    while shape.plain_bytes > free and shape.batch > 1:  # the plain one must fit beside ours
        shape = replace(shape, batch=shape.batch // 2)
    about = {"phase": "attention", "kept": kept, "batch": shape.batch, "length": shape.length}
    names = list(IMPLEMENTATIONS)
    if rows.has({**about, "implementation": name} for name in names):
        return
    if shape.batch != asked:
        print(f"batch {shape.batch}: the full matrix of {asked} samples of {shape.length} tokens does not fit",
              file=sys.stderr)  # fmt: skip
    if shape.plain_bytes > free:
        rows.add(**about, implementation="plain", fits=False)
        names.remove("plain")
    inputs = attention_inputs(shape, kept, device)
    calls = {name: partial(IMPLEMENTATIONS[name], inputs) for name in names}
    times = interleaved(calls, device, repeats)
    del inputs, calls
    release(device)
    _add(rows, about, times, {name: attention_peak(shape, kept, name, device) for name in names})


def _step(rows: Rows, settings: StepSettings, device: torch.device, args: argparse.Namespace) -> None:
    about = {"phase": "step", "kept": "paper", "batch": settings.batch, "length": settings.length}
    names = ["plain", "ours"]
    if rows.has({**about, "implementation": name} for name in names):
        return
    release(device)
    peak, peak_from = peak_flops(device, settings.dtype, args.peak_tflops)
    step = Step(settings)
    times = interleaved({name: partial(step, name) for name in names}, device, args.repeats)
    here = step if device.type == "cuda" else None
    del step
    release(device)
    peaks = {name: step_peak(settings, name, here) for name in names}
    about |= {
        "checkpointing": settings.checkpointing, "optimizer": settings.optimizer, "model_tflops": settings.flops / 1e12,
        "peak_tflops": peak / 1e12, "peak_from": peak_from, "devices": args.devices,
    }  # fmt: skip
    _add(rows, about, times, peaks, settings)


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
        found, peak = summary(taken), peaks[name]
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
            **about, implementation=name, **found, fits=True, peak_bytes=peak,
            time_ratio=median / summary(base)["median_s"] if base else None,
            memory_ratio=peak / base_peak if base_peak and peak is not None else None, **speed,
        )  # fmt: skip
