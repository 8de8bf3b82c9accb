"""`dynllava bench PHASE`: arguments, checks before anything is allocated, and the run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynllava_plugin.bench.decode import batching, decode, steps_measured
from dynllava_plugin.bench.flags import chosen, numbers
from dynllava_plugin.bench.harness import add_harness, run_harness
from dynllava_plugin.bench.loading import load
from dynllava_plugin.bench.memory import STEPS, memory
from dynllava_plugin.bench.modes import MODES, modes_named
from dynllava_plugin.bench.passes import nocache, prefill
from dynllava_plugin.bench.report import report
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.run import PATHS, Run
from dynllava_plugin.bench.score import ANSWER, score
from dynllava_plugin.bench.shapes import SHAPES, shape_named
from dynllava_plugin.bench.subject import Subject, check_rates, check_tokens, estimated_bytes
from dynllava_plugin.bench.timing import find_device, require_memory
from dynllava_plugin.bench.train import add_train, run_train
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape

PHASES: dict[str, Callable[[Run], None]] = {
    "prefill": prefill,
    "decode": decode,
    "batching": batching,
    "nocache": nocache,
    "score": score,
    "memory": memory,
    "load": load,
}
# Phases with rows and flags of their own.
OWN_ROWS: dict[str, Callable[[argparse.Namespace], int]] = {"train": run_train, "harness": run_harness}
REPORT = "report"
SEVERAL_CACHES = ("decode", "batching")  # phases whose modes hold their caches side by side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`dynllava bench`'s phases and flags."""
    phases = parser.add_subparsers(dest="phase", required=True, metavar="PHASE")
    for name in (*PHASES, "all"):
        summary = "all of the above" if name == "all" else (PHASES[name].__doc__ or "").splitlines()[0]
        phase = phases.add_parser(name, help=summary, description=summary)
        phase.set_defaults(only=name)
        if name == "all":
            phase.add_argument(
                "--only", default=",".join(PHASES), help="comma-separated phases (default: %(default)s)"
            )
        _add_flags(phase)
    merge = phases.add_parser(REPORT, help="table and plots of rows measured earlier, on any machine")
    merge.add_argument("files", nargs="+", type=Path, metavar="ROWS.json", help="as written by --json")
    merge.add_argument("--output", type=Path, metavar="DIR", default=Path("results/efficiency"))
    add_train(phases)
    add_harness(phases)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    default = "(default: %(default)s)"
    parser.add_argument(
        "--shape", default="cpu-medium", help=f"{', '.join(SHAPES)} or LAYERSxWIDTHxHEADS {default}"
    )
    parser.add_argument(
        "--mode",
        default=",".join(MODES),
        help=f"comma-separated, of {', '.join(MODES)}, or policies with their arguments (h2o,r=0.5) {default}",
    )
    parser.add_argument("--batch", default="1,8", help=f"comma-separated batch sizes {default}")
    parser.add_argument("--new-tokens", type=int, default=1000, help=f"generated tokens at the end {default}")
    parser.add_argument(
        "--at", help="comma-separated generated tokens at which to measure (default: five up to --new-tokens)"
    )
    parser.add_argument(
        "--path", default="eager", help=f"decode steps: comma-separated, of {', '.join(PATHS)} {default}"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=default)
    parser.add_argument(
        "--dtype",
        default=None,
        help="float32, bfloat16 or float16 (default: float32 on the CPU, else bfloat16)",
    )
    parser.add_argument("--image-tokens", type=int, default=576, help=f"of a prompt {default}")
    parser.add_argument("--text-tokens", type=int, default=60, help=f"of a prompt {default}")
    parser.add_argument(
        "--vision-keep-rate", type=float, default=0.2, help=f"share of image tokens kept {default}"
    )
    parser.add_argument(
        "--text-keep-rate", type=float, default=0.5, help=f"share of output tokens kept {default}"
    )
    parser.add_argument("--repeats", type=int, default=7, help=f"measured turns of every call {default}")
    parser.add_argument("--warmup", type=int, default=1, help=f"unmeasured turns before {default}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, whole after every one")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also write table.csv, table.md, plots and machine.json"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the rows already in --json or --output"
    )


def run(args: argparse.Namespace) -> int:
    """Measure; 130 where the user interrupts, with the rows so far kept."""
    if args.phase == REPORT:
        report(args.files, args.output)
        return 0
    if args.phase in OWN_ROWS:
        return OWN_ROWS[args.phase](args)
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
        policy.check(shape.layers)
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
            PHASES[name](plan)
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


def main(arguments: list[str] | None = None) -> int:
    """`python -m dynllava_plugin.bench`."""
    parser = argparse.ArgumentParser(
        prog="dynllava bench", description="Time and memory with random weights."
    )
    add_arguments(parser)
    args: Any = parser.parse_args(arguments)
    try:
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
