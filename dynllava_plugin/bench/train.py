"""`dynllava bench train`: the training attention and a whole training step, against the full-matrix implementation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dynllava_plugin.bench.flags import chosen, numbers
from dynllava_plugin.bench.masked_cases import AttentionShape, attention_inputs
from dynllava_plugin.bench.parsers import KEPT, PARTS
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.shapes import shape_named
from dynllava_plugin.bench.timing import (
    about_here,
    dtype_named,
    find_device,
    interleaved,
    release,
    require_memory,
    summary,
)
from dynllava_plugin.bench.train_attention import IMPLEMENTATIONS, plain_bytes
from dynllava_plugin.bench.train_memory import attention_peak, step_peak
from dynllava_plugin.bench.train_step import Step, StepSettings, epoch_hours, peak_flops
from dynllava_plugin.environment import free_bytes
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape


class TrainRows(Rows):
    """Rows of `bench train`: one an implementation, with its ratios to the plain one."""

    keys = ("phase", "shape", "device", "dtype", "implementation", "kept", "batch", "length")
    needed = ("phase", "implementation")
    columns = (
        *keys, "median_s", "min_s", "max_s", "iqr_s", "repeats", "peak_bytes", "time_ratio", "memory_ratio", "fits",
        "samples_per_s", "tokens_per_s", "model_tflops", "mfu", "peak_tflops", "peak_from", "devices", "epoch_hours",
        "checkpointing", "optimizer", "threads",
    )  # fmt: skip


def run_train(args: argparse.Namespace) -> int:
    """Measure; 130 where the user interrupts, with the rows so far kept."""
    device = find_device(args.device)
    name = args.shape or ("cpu-medium" if device.type == "cpu" else "llava-1.5-7b")
    shape, common = shape_named(name), about_here(device, args.dtype)
    checkpointing = device.type != "cpu" if args.checkpointing is None else args.checkpointing
    dtype = dtype_named(args.dtype, device)
    parts, kept = chosen("--only", args.only, PARTS), chosen("--kept", args.kept, KEPT)
    lengths, devices = numbers("--lengths", args.lengths), numbers("--devices", args.devices)
    for flag, value, least in (
        ("--repeats", args.repeats, 1),
        ("--batch", args.batch, 1),
        ("--text-tokens", args.text_tokens, 4),
        ("--peak-tflops", args.peak_tflops, 1e-6),
    ):
        if value is not None and not value >= least:
            raise UserError(f"{flag}: {value} is less than {least}")
    settings = StepSettings(
        shape, str(device), dtype, args.batch or (4 if device.type == "cpu" else 8), args.text_tokens,
        checkpointing, args.optimizer,
    )  # fmt: skip
    if "step" in parts:
        require_memory(settings.needed_bytes, device, f"--shape {name} --optimizer {args.optimizer}")
    rows = TrainRows.of(args, shape=name, **common)

    def work() -> None:
        if "attention" in parts:
            batch = args.batch or (1 if device.type == "cpu" else 8)
            for length in lengths:
                for what in kept:
                    _attention(rows, attention_shape(shape, length, batch, dtype), what, device, args.repeats)
        if "step" in parts:
            _step(rows, settings, device, args.repeats, devices, args.peak_tflops)

    return rows.carry_out(work, args.output)


def attention_shape(shape: DecoderShape, length: int, batch: int, dtype: torch.dtype) -> AttentionShape:
    """One layer's attention."""
    return AttentionShape(length, batch, shape.heads, shape.kv_heads, shape.hidden // shape.heads, dtype)


def _attention(rows: Rows, shape: AttentionShape, kept: str, device: torch.device, repeats: int) -> None:
    release(device)
    asked = shape.batch
    while plain_bytes(shape) > free_bytes(device) and shape.batch > 1:  # the plain one must fit beside ours
        shape = replace(shape, batch=shape.batch // 2)
    about = {"phase": "attention", "kept": kept, "batch": shape.batch, "length": shape.length}
    names = list(IMPLEMENTATIONS)
    if rows.has({**about, "implementation": name} for name in names):
        return
    if shape.batch != asked:
        print(f"batch {shape.batch}: the full matrix of {asked} samples of {shape.length} tokens does not fit",
              file=sys.stderr)  # fmt: skip
    if plain_bytes(shape) > free_bytes(device):
        rows.add(**about, implementation="plain", fits=False)
        names.remove("plain")
    inputs = attention_inputs(shape, kept, device)
    calls = {name: partial(IMPLEMENTATIONS[name], inputs) for name in names}
    times = interleaved(calls, device, repeats)
    del inputs, calls
    release(device)
    peaks = {name: attention_peak(shape, kept, name, device) for name in names}
    _add(rows, about, times, peaks, lambda seconds: {})


def _step(
    rows: Rows,
    settings: StepSettings,
    device: torch.device,
    repeats: int,
    devices: list[int],
    peak_tflops: float | None,
) -> None:
    about = {"phase": "step", "kept": "paper", "batch": settings.batch, "length": settings.length}
    names = ["plain", "ours"]
    if rows.has({**about, "implementation": name} for name in names):
        return
    release(device)
    peak, peak_from = peak_flops(device, settings.dtype, peak_tflops)
    step = Step(settings)
    times = interleaved({name: partial(step, name) for name in names}, device, repeats)
    here = step if device.type == "cuda" else None
    if here is None:
        del step
        release(device)
    peaks = {name: step_peak(settings, name, here) for name in names}

    def speed(seconds: float) -> dict[str, Any]:
        samples_per_s = settings.batch / seconds
        flops = settings.flops / seconds
        return {
            "samples_per_s": samples_per_s, "tokens_per_s": samples_per_s * settings.length,
            "model_tflops": settings.flops / 1e12, "mfu": flops / peak, "peak_tflops": peak / 1e12, "peak_from": peak_from,
            "devices": devices, "epoch_hours": [epoch_hours(samples_per_s, n) for n in devices],
            "checkpointing": settings.checkpointing, "optimizer": settings.optimizer,
        }  # fmt: skip

    _add(rows, about, times, peaks, speed)


def _add(
    rows: Rows,
    about: dict[str, Any],
    times: dict[str, list[float]],
    peaks: dict[str, int | None],
    more: Callable[[float], dict[str, Any]],
) -> None:
    """A row for each implementation."""
    base = summary(times["plain"])["median_s"] if "plain" in times else None
    base_peak = peaks.get("plain")
    for name, seconds in times.items():
        found, peak = summary(seconds), peaks[name]
        row = rows.add(
            **about, implementation=name, **found, fits=True, peak_bytes=peak,
            time_ratio=found["median_s"] / base if base else None,
            memory_ratio=peak / base_peak if base_peak and peak is not None else None,
            **more(found["median_s"]),
        )  # fmt: skip
        print(describe(row), file=sys.stderr, flush=True)


def describe(row: dict[str, Any]) -> str:
    """A row in one line."""
    parts = [
        f"{row['phase']:9s} {row['kept']:5s} batch {row['batch']:<2d} length {row['length']:<5d} {row['implementation']:5s}",
        f"{row['median_s'] * 1e3:9.1f} ms",
    ]
    if row["peak_bytes"] is not None:
        parts.append(f"{row['peak_bytes'] / 2**20:7.0f} MiB")
    if row["time_ratio"] is not None:
        parts.append(f"time {row['time_ratio']:.2f}x")
    if row["memory_ratio"] is not None:
        parts.append(f"memory {row['memory_ratio']:.2f}x of plain")
    if row.get("mfu") is not None:
        parts.append(f"{row['samples_per_s']:.2f} samples/s, MFU {row['mfu']:.1%}")
        parts += [
            f"{h:.0f} h an epoch on {n}" for n, h in zip(row["devices"], row["epoch_hours"], strict=True)
        ]
    return "  ".join(parts)
