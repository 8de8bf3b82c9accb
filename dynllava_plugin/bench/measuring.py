"""`dynllava bench` of the phases that share a subject: checks before anything is allocated, and the measurements."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch

from dynllava_plugin.bench.decode import steps_measured
from dynllava_plugin.bench.flags import chosen, numbers
from dynllava_plugin.bench.memory import STEPS
from dynllava_plugin.bench.modes import Mode, modes_named
from dynllava_plugin.bench.parsers import PATHS, PHASES
from dynllava_plugin.bench.pictures import Loaded
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.run import Run
from dynllava_plugin.bench.score import ANSWER
from dynllava_plugin.bench.shapes import shape_named
from dynllava_plugin.bench.subject import Subject, check_rates, check_tokens, estimated_bytes
from dynllava_plugin.bench.timing import about_here, dtype_named, find_device, require_memory
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape

SEVERAL_CACHES = ("decode", "batching")  # phases whose modes hold their caches side by side


def measure(args: argparse.Namespace) -> int:
    """Carry out the phases of `args.only`; return 0, or 130 where the user interrupts: the rows so far are kept."""
    phases, device = chosen("--only", args.only, PHASES), find_device(args.device)
    modes, paths = modes_named(args.mode), chosen("--path", args.path, PATHS)
    dtype, common = dtype_named(args.dtype, device), about_here(device, args.dtype)
    batches, lengths = numbers("--batch", args.batch, least=0), _lengths(args)
    if args.repeats < 1 or args.warmup < 0:
        raise UserError("--repeats must be at least 1 and --warmup at least 0")
    if (args.pretrained is None) != (args.images is None) or (args.pretrained and args.shape):
        raise UserError("--pretrained: goes with --images DIR, and without --shape")
    name = Path(args.pretrained).name if args.pretrained else args.shape or "cpu-medium"
    shape = shape_named(name) if args.pretrained is None else None
    _check_numbers(args, batches, modes, shape)
    rows = Rows.of(
        args, shape=name, **common, image_tokens=args.image_tokens, text_tokens=args.text_tokens,
        vision_keep_rate=args.vision_keep_rate, text_keep_rate=args.text_keep_rate,
    )  # fmt: skip
    loaded = None
    if args.pretrained is not None:
        loaded = Loaded(args.pretrained, args.images, device, dtype)
        shape = loaded.shape
        args.image_tokens, args.text_tokens = loaded.tokens()
        rows.common |= {"image_tokens": args.image_tokens, "text_tokens": args.text_tokens}
        _check_numbers(args, batches, modes, shape)
        if loaded.model.fresh_predictors and any(mode.policy().predictors for mode in modes):
            print(
                f"{name} has no predictors: untrained ones stand in where a mode asks them", file=sys.stderr
            )
    assert shape is not None
    plan = Run(None, rows, modes, batches, lengths, paths, args.repeats, args.warmup)  # type: ignore[arg-type]
    _check_memory(args, plan, shape, phases, device, dtype, weights=loaded is None)
    plan.subject = Subject(
        shape, device, dtype, args.image_tokens, args.text_tokens, args.vision_keep_rate, args.text_keep_rate, loaded
    )  # fmt: skip

    def work() -> None:
        for name in phases:
            module = import_module(f"dynllava_plugin.bench.{PHASES[name][0]}")
            getattr(module, name)(plan)

    return rows.carry_out(work, args.output)


def _check_numbers(
    args: argparse.Namespace, batches: list[int], modes: list[Mode], shape: DecoderShape | None
) -> None:
    """Counts and rates in range, and policies that a model of this depth and these images can run."""
    check_tokens(args.image_tokens, args.text_tokens, batches, args.new_tokens)
    check_rates(args.vision_keep_rate, args.text_keep_rate, args.image_tokens)
    for mode in modes if shape is not None else ():
        policy = mode.policy(args.vision_keep_rate).of_depth(shape.layers)  # type: ignore[union-attr]
        policy.check()
        policy.check_image(args.image_tokens)


def _check_memory(
    args: argparse.Namespace,
    plan: Run,
    shape: DecoderShape,
    phases: list[str],
    device: torch.device,
    dtype: torch.dtype,
    weights: bool,
) -> None:
    """Weights (unless they are there) and the largest phase must fit before it is allocated; `memory` itself reports what can't."""
    contexts = [
        mode.context(
            shape.layers, args.image_tokens, args.text_tokens, args.vision_keep_rate, args.text_keep_rate
        )
        for mode in plan.modes
    ]
    most = 0.0
    there = estimated_bytes(shape, contexts[:1], 1, 1, dtype.itemsize)[0] if weights else 0.0
    for name in phases:
        if name in ("memory", "load"):
            continue
        new = {"prefill": 0, "score": ANSWER}.get(name, plan.lengths[-1] + max(steps_measured(plan), STEPS))
        held = contexts * len(plan.paths) if name in SEVERAL_CACHES else contexts[:1]
        rest = estimated_bytes(
            shape, held, max(plan.batches), new, dtype.itemsize, name in (*SEVERAL_CACHES, "prefill")
        )[1]
        most = max(most, rest)
    require_memory(there + most, device, f"--shape {plan.rows.common['shape']}")


def _lengths(args: argparse.Namespace) -> list[int]:
    if args.at:
        return sorted(set(numbers("--at", args.at, least=0)))
    return sorted({round(args.new_tokens * part / 4) for part in range(5)})
