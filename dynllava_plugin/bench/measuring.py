"""`dynllava bench` of the phases that share a model: checks before anything is allocated, and the measurements."""

from __future__ import annotations

import argparse
import math
import sys
from importlib import import_module
from pathlib import Path

from dynllava_plugin.bench.command import PHASES
from dynllava_plugin.bench.decode import steps_measured
from dynllava_plugin.bench.memory import STEPS
from dynllava_plugin.bench.modes import context_in, policy_in
from dynllava_plugin.bench.pictures import Loaded
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.run import Run
from dynllava_plugin.bench.score import ANSWER
from dynllava_plugin.bench.shapes import shape_named
from dynllava_plugin.bench.subject import Subject, working_bytes
from dynllava_plugin.bench.timing import place, require_memory
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape

RATES = ("vision_keep_rate", "text_keep_rate")


def run(args: argparse.Namespace) -> int:
    """Carry out the phases of `args.only`; return 0, or 130 where the user interrupts: the rows so far are kept."""
    device, dtype, here = place(args.device, args.dtype)
    if (args.pretrained is None) != (args.images is None) or (args.pretrained and args.shape):
        raise UserError("--pretrained: goes with --images DIR, and without --shape")
    name = Path(args.pretrained).name if args.pretrained else args.shape or "cpu-medium"
    shape = shape_named(name) if args.pretrained is None else None
    if shape is not None:
        _check(args, shape)
    common = {"shape": name, **here, "image_tokens": args.image_tokens, "text_tokens": args.text_tokens}
    rates = {rate: getattr(args, rate) for rate in RATES}
    rows = Rows.of(args, {**common, **rates})
    loaded = None
    if args.pretrained is not None:
        loaded = Loaded(args.pretrained, args.images, device, dtype)
        args.image_tokens, args.text_tokens = loaded.tokens()
        rows.common |= {"image_tokens": args.image_tokens, "text_tokens": args.text_tokens}
        shape = loaded.shape
        _check(args, shape)
        if loaded.model.fresh_predictors and any(policy_in(mode).predictors for mode in args.mode):
            print(
                f"{name} has no predictors: untrained ones stand in where a mode asks them", file=sys.stderr
            )
    assert shape is not None
    lengths = sorted(set(args.at or (round(args.new_tokens * part / 4) for part in range(5))))
    weights = 0 if loaded else shape.parameters * dtype.itemsize
    require_memory(weights + _largest(args, shape, lengths, dtype.itemsize), device, f"--shape {name}")
    subject = Subject(shape, device, dtype, args.image_tokens, args.text_tokens, **rates, loaded=loaded)
    plan = Run(subject, rows, args.mode, args.batch, lengths, args.path, args.repeats, args.warmup)

    def work() -> None:
        for phase in args.only:
            getattr(import_module(f"dynllava_plugin.bench.{PHASES[phase][0]}"), phase)(plan)

    return rows.carry_out(work, args.output)


def _check(args: argparse.Namespace, shape: DecoderShape) -> None:
    """A rate that keeps something, and policies that a model of this depth and these images can run."""
    if math.floor(args.vision_keep_rate * args.image_tokens + 1e-9) < 1:
        raise UserError(
            f"--vision-keep-rate: {args.vision_keep_rate} keeps none of {args.image_tokens} image tokens"
        )
    for mode in args.mode:
        policy = policy_in(mode, args.vision_keep_rate).of_depth(shape.layers)
        policy.check()
        policy.check_image(args.image_tokens)


def _largest(args: argparse.Namespace, shape: DecoderShape, lengths: list[int], itemsize: int) -> float:
    """Bytes beside the weights of the largest phase; `memory` itself reports what can't fit."""
    text = args.image_tokens, args.text_tokens, args.vision_keep_rate, args.text_keep_rate
    contexts = [context_in(mode, shape.layers, *text) for mode in args.mode]
    most = 0.0
    for phase in set(args.only) - {"memory", "load"}:
        steps = lengths[-1] + max(steps_measured(args), STEPS)
        fed = {"prefill": 0, "score": ANSWER}.get(phase, steps)
        # Decoding modes hold their caches side by side.
        caches = contexts * len(args.path) if phase in ("decode", "batching") else contexts[:1]
        whole = phase in ("nocache", "score")
        most = max(most, working_bytes(shape, caches, max(args.batch), fed, itemsize, whole))
    return most
