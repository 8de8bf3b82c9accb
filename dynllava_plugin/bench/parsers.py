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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`dynllava bench`'s phases and flags."""
    phases = parser.add_subparsers(dest="phase", required=True, metavar="PHASE")
    for name in (*PHASES, "all"):
        summary = "all of the above" if name == "all" else PHASES[name][1]
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
    _add_train(phases)
    _add_harness(phases)
    _add_serve(phases)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    default = "(default: %(default)s)"
    parser.add_argument(
        "--shape",
        help=f"random weights of {', '.join(SHAPES)} or LAYERSxWIDTHxHEADS (default: cpu-medium)",
    )
    parser.add_argument("--pretrained", metavar="CKPT", help="a checkpoint instead, asked about --images")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures for --pretrained")
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
    parser.add_argument("--device", help="(default: cuda where there is a GPU, else cpu)")
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


def _add_train(phases: Any) -> None:
    """The phase `train` and its flags."""
    text = "training attention and step: time and peak memory against the full matrix"
    parser = phases.add_parser("train", help=text, description=text)
    default = "(default: %(default)s)"
    flag = parser.add_argument
    flag("--only", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)} {default}")
    flag(
        "--shape",
        help=f"{', '.join(SHAPES)} or LAYERSxWIDTHxHEADS (default: llava-1.5-7b on a GPU, else cpu-medium)",
    )
    flag("--lengths", default=LENGTHS, help=f"of the attention, comma-separated {default}")
    flag(
        "--kept",
        default=",".join(KEPT),
        help=f"what the masks of the attention keep: the paper's rates, all tokens {default}",
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
        help=f"of a step's sample, beside the 576 of its image {default}",
    )
    flag(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="gradient checkpointing in a step (default: on a GPU)",
    )
    flag(
        "--optimizer",
        choices=("adamw", "sgd"),
        default="adamw",
        help=f"states in the weights' dtype {default}",
    )
    flag("--devices", default="1,8", help=f"hours of an epoch are given for so many {default}")
    flag("--peak-tflops", type=float, help="of the device (default: its data sheet's, or measured)")
    flag("--device", help="(default: cuda where there is a GPU, else cpu)")
    flag(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="(default: bfloat16 on a GPU, else float32)",
    )
    flag("--repeats", type=int, default=5, help=f"measured turns of every call {default}")
    flag("--json", type=Path, metavar="FILE", help="rows, whole after every one")
    flag(
        "--output",
        type=Path,
        metavar="DIR",
        help="also write table.csv, table.md, chart.png and machine.json",
    )
    flag("--resume", action="store_true", help="go on from the rows already in --json or --output")


def _add_harness(phases: Any) -> None:
    """The phase `harness` and its flags."""
    text = "questions a second in each harness: one at a time and in batches"
    parser = phases.add_parser("harness", help=text, description=text)
    default = "(default: %(default)s)"
    flag = parser.add_argument
    flag("--pretrained", default="tiny", help=f"checkpoint folder, hub id, or tiny {default}")
    flag("--benchmark", default="easy_vqa", help=f"one that both harnesses have {default}")
    flag("--limit", type=int, default=1000, help=f"questions {default}")
    flag("--batch", default="1,8,32", help=f"comma-separated batch sizes, 1 among them {default}")
    flag(
        "--harness", default=",".join(HARNESSES), help=f"comma-separated, of {', '.join(HARNESSES)} {default}"
    )
    flag("--policy", help="instead of the checkpoint's own, e.g. full or fastv,k=3,r=0.75")
    flag("--repeats", type=int, default=3, help=f"runs of each {default}")
    flag("--json", type=Path, metavar="FILE", help="rows, whole after every run")
    flag("--output", type=Path, metavar="DIR", help="also write table.csv, table.md, chart.png, machine.json")
    flag("--resume", action="store_true", help="go on from the rows already in --json or --output")


def _add_serve(phases: Any) -> None:
    """The phase `serve` and its flags."""
    text = "requests a second and time to the first token of `dynllava serve`, for so many clients at once"
    parser = phases.add_parser("serve", help=text, description=text)
    default = "(default: %(default)s)"
    flag = parser.add_argument
    flag("--pretrained", default="tiny", help=f"checkpoint folder, hub id, or tiny {default}")
    flag("--images", type=Path, metavar="DIR", help="pictures to ask about (default: one of noise)")
    flag(
        "--mode",
        default="image_text",
        help=f"comma-separated, against full context: as of other phases {default}",
    )
    flag("--clients", default="1,4,16,32", help=f"comma-separated {default}")
    flag(
        "--requests", type=int, default=32, help=f"of a burst, or one a client where those are more {default}"
    )
    flag("--new-tokens", type=int, default=32, help=f"of every answer {default}")
    flag("--device", help="(default: cuda where there is a GPU, else cpu)")
    flag("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    flag("--repeats", type=int, default=3, help=f"bursts of each {default}")
    flag("--json", type=Path, metavar="FILE", help="rows, whole after every number of clients")
    flag("--output", type=Path, metavar="DIR", help="also write table.csv, table.md and machine.json")
    flag("--resume", action="store_true", help="go on from the rows already in --json or --output")
