"""`dynllava bench` of the phases that share a subject: checks before anything is allocated, and the measurements."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module

import torch

from dynllava_plugin.bench.decode import steps_measured
from dynllava_plugin.bench.flags import chosen, numbers
from dynllava_plugin.bench.memory import STEPS
from dynllava_plugin.bench.modes import modes_named
from dynllava_plugin.bench.parsers import PATHS, PHASES
from dynllava_plugin.bench.report import report
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.run import Run
from dynllava_plugin.bench.score import ANSWER
from dynllava_plugin.bench.shapes import shape_named
from dynllava_plugin.bench.subject import Subject, check_rates, check_tokens, estimated_bytes
from dynllava_plugin.bench.timing import find_device, require_memory
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape

SEVERAL_CACHES = ("decode", "batching")  # phases whose modes hold their caches side by side


def measure(args: argparse.Namespace) -> int:
    """Carry out the phases of `args.only`; return 0, or 130 where the user interrupts: the rows so far are kept."""
    phases = chosen("--only", args.only, PHASES)
    shape, device = shape_named(args.shape), find_device(args.device)
    modes, paths, dtype = (
        modes_named(args.mode),
        chosen("--path", args.path, PATHS),
        _dtype(args.dtype, device),
    )
    batches, lengths = numbers("--batch", args.batch, least=0), _lengths(args)
    check_tokens(args.image_tokens, args.text_tokens, batches, args.new_tokens)
    check_rates(args.vision_keep_rate, args.text_keep_rate, args.image_tokens)
    if args.repeats < 1 or args.warmup < 0:
        raise UserError("--repeats must be at least 1 and --warmup at least 0")
    for mode in modes:
        policy = mode.policy(args.vision_keep_rate).of_depth(shape.layers)
        policy.check()
        if args.image_tokens:
            policy.check_image(args.image_tokens)
    plan = Run(None, None, modes, batches, lengths, paths, args.repeats, args.warmup)  # type: ignore[arg-type]
    _check_memory(args, plan, shape, phases, device, dtype)
    common = {
        "shape": args.shape, "device": _device_name(device), "dtype": str(dtype).removeprefix("torch."),
        "image_tokens": args.image_tokens, "text_tokens": args.text_tokens, "vision_keep_rate": args.vision_keep_rate,
        "text_keep_rate": args.text_keep_rate, "threads": torch.get_num_threads(),
    }  # fmt: skip
    path = args.json or (args.output / "rows.json" if args.output else None)
    plan.rows = Rows(path, args.resume, common)
    plan.subject = Subject(
        shape, device, dtype, args.image_tokens, args.text_tokens, args.vision_keep_rate, args.text_keep_rate
    )
    status = 0
    try:
        for name in phases:
            module = import_module(f"dynllava_plugin.bench.{PHASES[name][0]}")
            getattr(module, name)(plan)
    except KeyboardInterrupt:
        print("interrupted: the rows so far are kept", file=sys.stderr)
        status = 130
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch, --new-tokens: {device} ran out of memory; take less (the rows so far are kept)"
        ) from None
    if args.output and path:
        report([path], args.output)
    elif path is None:
        print(json.dumps(plan.rows.rows, indent=1))
    return status


def _check_memory(
    args: argparse.Namespace,
    plan: Run,
    shape: DecoderShape,
    phases: list[str],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Weights and the largest phase must fit before the first is allocated; `memory` reports what can't by itself."""
    contexts = [
        mode.context(
            shape.layers, args.image_tokens, args.text_tokens, args.vision_keep_rate, args.text_keep_rate
        )
        for mode in plan.modes
    ]
    most = 0.0
    weights, _ = estimated_bytes(shape, contexts[:1], 1, 1, dtype.itemsize)
    for name in phases:
        if name in ("memory", "load"):
            continue
        new = {"prefill": 0, "score": ANSWER}.get(name, plan.lengths[-1] + max(steps_measured(plan), STEPS))
        held = contexts * len(plan.paths) if name in SEVERAL_CACHES else contexts[:1]
        rest = estimated_bytes(
            shape, held, max(plan.batches), new, dtype.itemsize, name in (*SEVERAL_CACHES, "prefill")
        )[1]
        most = max(most, rest)
    require_memory(weights + most, device, f"--shape {args.shape}")


def _lengths(args: argparse.Namespace) -> list[int]:
    if args.at:
        return sorted(set(numbers("--at", args.at, least=0)))
    return sorted({round(args.new_tokens * part / 4) for part in range(5)})


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    name = name or ("float32" if device.type == "cpu" else "bfloat16")
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype: {name!r} is not one of float32, bfloat16, float16")
    return getattr(torch, name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
