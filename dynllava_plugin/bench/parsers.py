"""The flags of `dynllava bench`. No torch here: `--help` and a misspelt flag are answered at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dynllava_plugin.bench.modes import MODES
from dynllava_plugin.bench.shapes import SHAPES
from dynllava_plugin.evaluation.benchmarks import HARNESSES

# A phase's module here, whose function has the phase's name, and what it measures.
PHASES = {
    "prefill": ("passes", "Prefill into a fresh cache, logits of the last token, per batch size."),
    "decode": ("decode", "Steps of every mode and path, in turns, after each number of generated tokens."),
    "batching": (
        "decode",
        "Tokens a second of a batch of mixed prompt lengths against a batch of one, in one interleaved run.",
    ),
    "nocache": (
        "passes",
        "One step without cache (the whole context again) after each number of generated tokens.",
    ),
    "score": (
        "score",
        "Both ways for every mode and batch size, with the largest difference of a log-probability.",
    ),
    "memory": (
        "memory",
        "Every mode and batch size through prefill and decoding; what can't fit is a row, too.",
    ),
    "load": (
        "loading",
        "`load_model` of the shape's checkpoint: seconds and memory until every weight has been read once.",
    ),
}
REPORT = "report"
PATHS = ("eager", "static", "compiled")  # how decode steps run
PARTS = ("attention", "step")  # of `bench train`
KEPT = ("paper", "all")
LENGTHS = "512,1024,2048,4096"


DEFAULT = "(default: %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`dynllava bench`'s phases and flags."""
    phases = parser.add_subparsers(dest="phase", required=True, metavar="PHASE")
    for name in (*PHASES, "all"):
        phase = _phase(phases, name, "all of the above" if name == "all" else PHASES[name][1])
        phase.set_defaults(only=name)
        if name == "all":
            phase.add_argument("--only", default=",".join(PHASES), help=f"comma-separated phases {DEFAULT}")
        _add_flags(phase)
    merge = _phase(phases, REPORT, "table and plots of rows measured earlier, on any machine")
    merge.add_argument("files", nargs="+", type=Path, metavar="ROWS.json", help="as written by --json")
    merge.add_argument("--output", type=Path, metavar="DIR", default=Path("results/efficiency"))
    _add_train(
        _phase(phases, "train", "training attention and step: time and peak memory against the full matrix")
    )
    _add_harness(
        _phase(phases, "harness", "questions a second in each harness: one at a time and in batches")
    )
    _add_serve(
        _phase(
            phases,
            "serve",
            "`dynllava serve` under so many clients at once: requests/s, time to the first token",
        )
    )


def _phase(phases: Any, name: str, text: str) -> argparse.ArgumentParser:
    return phases.add_parser(name, help=text, description=text)


def _add_common(flag: Any, repeats: int, device: bool = True) -> None:
    """The flags of every phase that measures."""
    if device:
        flag("--device", help="(default: cuda where there is a GPU, else cpu)")
        flag("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, else bfloat16)")
    flag("--repeats", type=int, default=repeats, help=f"measured turns of each {DEFAULT}")
    flag("--json", type=Path, metavar="FILE", help="rows, whole after every one")
    flag("--output", type=Path, metavar="DIR", help="also write table.csv, table.md, charts and machine.json")
    flag("--resume", action="store_true", help="go on from the rows already in --json or --output")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    flag, shapes = parser.add_argument, f"{', '.join(SHAPES)} or LAYERSxWIDTHxHEADS"
    flag("--shape", help=f"random weights of {shapes} (default: cpu-medium)")
    flag("--pretrained", metavar="CKPT", help="a checkpoint instead, asked about --images")
    flag("--images", type=Path, metavar="DIR", help="pictures for --pretrained")
    modes = f"comma-separated, of {', '.join(MODES)}, or policies with their arguments (h2o,r=0.5)"
    flag("--mode", default=",".join(MODES), help=f"{modes} {DEFAULT}")
    flag("--batch", default="1,8", help=f"comma-separated batch sizes {DEFAULT}")
    flag("--new-tokens", type=int, default=1000, help=f"generated tokens at the end {DEFAULT}")
    flag(
        "--at", help="comma-separated generated tokens at which to measure (default: five up to --new-tokens)"
    )
    flag("--path", default="eager", help=f"decode steps: comma-separated, of {', '.join(PATHS)} {DEFAULT}")
    flag("--image-tokens", type=int, default=576, help=f"of a prompt {DEFAULT}")
    flag("--text-tokens", type=int, default=60, help=f"of a prompt {DEFAULT}")
    flag("--vision-keep-rate", type=float, default=0.2, help=f"share of image tokens kept {DEFAULT}")
    flag("--text-keep-rate", type=float, default=0.5, help=f"share of output tokens kept {DEFAULT}")
    flag("--warmup", type=int, default=1, help=f"unmeasured turns before {DEFAULT}")
    _add_common(flag, repeats=7)


def _add_train(parser: argparse.ArgumentParser) -> None:
    flag, shapes = parser.add_argument, f"{', '.join(SHAPES)} or LAYERSxWIDTHxHEADS"
    flag("--only", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)} {DEFAULT}")
    flag("--shape", help=f"{shapes} (default: llava-1.5-7b on a GPU, else cpu-medium)")
    flag("--lengths", default=LENGTHS, help=f"of the attention, comma-separated {DEFAULT}")
    flag(
        "--kept",
        default=",".join(KEPT),
        help=f"what the attention's masks keep: the paper's rates, all tokens {DEFAULT}",
    )
    flag(
        "--batch",
        type=int,
        help="samples (default: 8 on a GPU; on the CPU 1 for the attention, 4 for a step)",
    )
    flag(
        "--text-tokens",
        type=int,
        default=128,
        help=f"of a step's sample, beside the 576 of its image {DEFAULT}",
    )
    boolean = argparse.BooleanOptionalAction
    flag("--checkpointing", action=boolean, help="gradient checkpointing in a step (default: on a GPU)")
    optimizers = ("adamw", "sgd")
    flag("--optimizer", choices=optimizers, default="adamw", help=f"states in the weights' dtype {DEFAULT}")
    flag("--devices", default="1,8", help=f"hours of an epoch are given for so many {DEFAULT}")
    flag("--peak-tflops", type=float, help="of the device (default: its data sheet's, or measured)")
    _add_common(flag, repeats=5)


def _add_harness(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--pretrained", default="tiny", help=f"checkpoint folder, hub id, or tiny {DEFAULT}")
    flag("--benchmark", default="easy_vqa", help=f"one that both harnesses have {DEFAULT}")
    flag("--limit", type=int, default=1000, help=f"questions {DEFAULT}")
    flag("--batch", default="1,8,32", help=f"comma-separated batch sizes, 1 among them {DEFAULT}")
    flag(
        "--harness", default=",".join(HARNESSES), help=f"comma-separated, of {', '.join(HARNESSES)} {DEFAULT}"
    )
    flag("--policy", help="instead of the checkpoint's own, e.g. full or fastv,k=3,r=0.75")
    _add_common(flag, repeats=3, device=False)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--pretrained", default="tiny", help=f"checkpoint folder, hub id, or tiny {DEFAULT}")
    flag("--images", type=Path, metavar="DIR", help="pictures to ask about (default: one of noise)")
    flag(
        "--mode",
        default="image_text",
        help=f"comma-separated, against full context: as of other phases {DEFAULT}",
    )
    flag("--clients", default="1,4,16,32", help=f"comma-separated {DEFAULT}")
    flag(
        "--requests", type=int, default=32, help=f"of a burst, or one a client where those are more {DEFAULT}"
    )
    flag("--new-tokens", type=int, default=32, help=f"of every answer {DEFAULT}")
    _add_common(flag, repeats=3)
