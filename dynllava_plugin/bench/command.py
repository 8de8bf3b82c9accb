"""`dynllava bench PHASE`: every flag of every measurement. No torch here: help and a misspelt flag are answered at once."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from dynllava_plugin.bench.flags import Flags, at_least, numbers, read, share, some_of
from dynllava_plugin.bench.modes import MODES, modes_named
from dynllava_plugin.bench.shapes import SHAPES
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import HARNESSES

# Phases that share a model and what they measure; a phase is the function of its name in its module here.
PHASES = {
    "prefill": ("passes", "prefill into a fresh cache, logits of the last token"),
    "decode": ("decode", "steps of every mode and path, after each number of generated tokens"),
    "batching": ("decode", "tokens a second of a batch of mixed prompt lengths against a batch of one"),
    "nocache": ("passes", "one step without cache (the whole context again)"),
    "score": ("score", "an answer in one pass against token by token: time, and how far the two differ"),
    "memory": ("memory", "what prefill and decoding hold; what can't fit is a row, too"),
    "load": ("loading", "`load_model` against safetensors alone, until every weight has been read once"),
}
PATHS = ("eager", "static", "compiled")  # how decode steps run
PARTS = ("attention", "step")  # of `bench train`
KEPT = ("paper", "all")  # what the masks of `bench train` keep
ANY_SHAPE = f"{', '.join(SHAPES)} or LAYERSxWIDTHxHEADS"
ANY_MODE = f"of {', '.join(MODES)}, or policies with their arguments (h2o,r=0.5)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the phases of `dynllava bench` and their flags."""
    phases = parser.add_subparsers(dest="phase", required=True, metavar="PHASE")

    def flags_of(name: str, module: str, text: str) -> Flags:
        phase = phases.add_parser(name, help=text, description=text)
        phase.set_defaults(module=module, only=[name])
        return Flags(phase)

    for name, (_, text) in PHASES.items():
        _add_shared(flags_of(name, "measuring", text))
    everything = flags_of("all", "measuring", "all of the above")
    everything.add("--only", "comma-separated phases", ",".join(PHASES), some_of(PHASES))
    _add_shared(everything)
    report = flags_of("report", "report", "table and plots of rows measured earlier, on any machine").parser
    report.add_argument("files", nargs="+", type=Path, metavar="ROWS.json", help="as written by --json")
    report.add_argument("--output", type=Path, metavar="DIR", default=Path("results/efficiency"))
    _add_train(
        flags_of("train", "train", "training attention and step against the full matrix: time, memory")
    )
    _add_harness(
        flags_of("harness", "harness", "questions a second in each harness, one by one and in batches")
    )
    _add_serve(
        flags_of("serve", "serving", "`dynllava serve` under so many clients: requests/s, first token")
    )


def _add_device(flags: Flags) -> None:
    flags.add("--device", "(default: cuda where there is a GPU, else cpu)")
    flags.add("--dtype", "float32, bfloat16 or float16 (default: float32 on the CPU, else bfloat16)")


def _add_rows(flags: Flags, repeats: int) -> None:
    """Add what every phase that measures has."""
    flags.add("--repeats", "measured turns of each", str(repeats), at_least(1))
    flags.add("--json", "rows, whole after every one", type=Path, metavar="FILE")
    flags.add("--output", "also write table.csv, table.md, charts and machine.json", type=Path, metavar="DIR")
    flags.add("--resume", "go on from the rows already in --json or --output", action="store_true")


def _add_shared(flags: Flags) -> None:
    flags.add("--shape", f"random weights of {ANY_SHAPE} (default: cpu-medium)")
    flags.add("--pretrained", "a checkpoint instead, asked about --images", metavar="CKPT")
    flags.add("--images", "pictures for --pretrained", type=Path, metavar="DIR")
    flags.add("--mode", f"comma-separated, {ANY_MODE}", ",".join(MODES), modes_named)
    flags.add("--batch", "comma-separated batch sizes", "1,8", numbers(1))
    flags.add("--new-tokens", "generated tokens at the end", "1000", at_least(1))
    flags.add(
        "--at", "generated tokens at which to measure (default: five up to --new-tokens)", kind=numbers(0)
    )
    flags.add("--path", f"decode steps: comma-separated, of {', '.join(PATHS)}", "eager", some_of(PATHS))
    flags.add("--image-tokens", "of a prompt", "576", at_least(1))
    flags.add("--text-tokens", "of a prompt", "60", at_least(1))
    flags.add("--vision-keep-rate", "share of image tokens kept", "0.2", share)
    flags.add("--text-keep-rate", "share of output tokens kept", "0.5", share)
    flags.add("--warmup", "unmeasured turns before", "1", at_least(0))
    _add_device(flags)
    _add_rows(flags, repeats=7)


def _add_train(flags: Flags) -> None:
    flags.add("--only", f"comma-separated, of {', '.join(PARTS)}", ",".join(PARTS), some_of(PARTS))
    flags.add("--shape", f"{ANY_SHAPE} (default: llava-1.5-7b on a GPU, else cpu-medium)")
    flags.add("--lengths", "of the attention, comma-separated", "512,1024,2048,4096", numbers(1))
    flags.add(
        "--kept", "tokens that the attention keeps: at the paper's rates, all", ",".join(KEPT), some_of(KEPT)
    )
    flags.add(
        "--batch", "samples (default: 8; on the CPU 1 for the attention, 4 for a step)", kind=at_least(1)
    )
    flags.add("--text-tokens", "of a step's sample, beside the 576 of its image", "128", at_least(4))
    boolean = argparse.BooleanOptionalAction
    flags.add("--checkpointing", "gradient checkpointing in a step (default: on a GPU)", action=boolean)
    flags.add("--optimizer", "states in the weights' dtype", "adamw", choices=("adamw", "sgd"))
    flags.add("--devices", "hours of an epoch are given for so many", "1,8", numbers(1))
    flags.add(
        "--peak-tflops", "of the device (default: its data sheet's, or timed)", kind=at_least(1e-6, float)
    )
    _add_device(flags)
    _add_rows(flags, repeats=5)


def _add_harness(flags: Flags) -> None:
    flags.add("--pretrained", "checkpoint folder, hub id, or tiny", "tiny")
    flags.add("--benchmark", "one that both harnesses have", "easy_vqa")
    flags.add("--limit", "questions", "1000", at_least(1))
    flags.add("--batch", "comma-separated batch sizes, 1 among them", "1,8,32", numbers(1))
    both = ",".join(HARNESSES)
    flags.add("--harness", f"comma-separated, of {both}", both, some_of(HARNESSES))
    flags.add("--policy", "instead of the checkpoint's own, e.g. full or fastv,k=3,r=0.75")
    _add_rows(flags, repeats=3)


def _add_serve(flags: Flags) -> None:
    flags.add("--pretrained", "checkpoint folder, hub id, or tiny", "tiny")
    flags.add("--images", "pictures to ask about (default: one of noise)", type=Path, metavar="DIR")
    flags.add("--mode", f"comma-separated, against full context, {ANY_MODE}", "image_text", modes_named)
    flags.add("--clients", "comma-separated", "1,4,16,32", numbers(1))
    flags.add("--requests", "of a burst, or one a client where those are more", "32", at_least(1))
    flags.add("--new-tokens", "of every answer", "32", at_least(1))
    flags.add(
        "--batch-size", "comma-separated, the server's; one server of each takes turns", "8", numbers(1)
    )
    _add_device(flags)
    _add_rows(flags, repeats=3)


def run(args: argparse.Namespace) -> int:
    """Measure, or report; returns 130 where the user interrupts, with the rows so far kept."""
    read(args)
    return import_module(f"dynllava_plugin.bench.{args.module}").run(args)


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m dynllava_plugin.bench`; returns the exit status, 2 with one line for what the user can mend."""
    parser = argparse.ArgumentParser(prog="dynllava bench", description="Time and memory, measured.")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
