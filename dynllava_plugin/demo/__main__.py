"""`make demo`: data, finetuning, evaluation in both harnesses, table and chart.

Everything runs through the command lines that users type. A rerun takes up where the last one ended: each
part leaves a marker that names what it was made from, and is done again only where that has changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynllava_plugin.demo.parts import KEEP_MEMORY, ROOT, PartFailed, digest, make
from dynllava_plugin.demo.runs import evaluate, plan
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.own_sets.easy_vqa import DATA_VARIABLE
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.results.tables import render
from dynllava_plugin.files import write_json, write_text

CHECKPOINT = "dynamic_tiny"
PRESET = ROOT / "train" / "configs" / "tiny.yaml"
# Over the preset.
FINETUNE = {"held_out": "0", "logging_steps": "5", "dataloader_num_workers": "0", "seed": "0"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, 1 where a part failed, 2 where the user can mend the cause."""
    args = parse_arguments(arguments)
    try:
        demo(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PartFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m dynllava_plugin.demo", description=__doc__)
    add = parser.add_argument
    add("--limit", type=int, default=1000, help="questions of each benchmark (default: %(default)s)")
    add("--full", action="store_true", help="all test questions instead of --limit")
    add(
        "--output",
        type=Path,
        help="folder of table and chart (default: results/demo_LIMIT; with --full results/demo, which is committed)",
    )
    add(
        "--work",
        type=Path,
        default=Path("results/demo_work"),
        help="folder of data, checkpoint and runs (default: %(default)s)",
    )
    add("--checkpoint", help="evaluate this Dynamic-LLaVA instead of finetuning the bundled one")
    add("--steps", type=int, default=140, help="optimiser steps of the finetuning (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="questions answered at once (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="evaluations at a time (default: one a core)")
    add("--fresh", action="store_true", help="do everything again")
    args = parser.parse_args(arguments)
    for flag in ("limit", "steps", "batch_size", "jobs"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be positive")
    args.output = args.output or Path("results/demo" if args.full else f"results/demo_{args.limit}")
    return args


def demo(args: argparse.Namespace) -> None:
    """Carry out all parts in order."""
    if not (ROOT / "train" / "finetune.py").is_file():
        raise UserError(
            "the demo trains a model, and train/ isn't installed: run `make demo` from a checkout"
        )
    started = time.time()
    work = args.work.resolve()
    if args.fresh:
        for part in (work / "easy_vqa", work / CHECKPOINT, *work.glob("runs_*")):
            shutil.rmtree(part, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    data = build_data(work / "easy_vqa")
    if args.checkpoint and Path(args.checkpoint).is_dir():
        args.checkpoint = str(Path(args.checkpoint).resolve())
    checkpoint = args.checkpoint or str(finetune(data, work / CHECKPOINT, args.steps))
    limit = None if args.full else args.limit
    folder = work / ("runs_full" if limit is None else f"runs_{limit}")
    os.environ |= {DATA_VARIABLE: str(data), "HF_HUB_OFFLINE": "1", **KEEP_MEMORY}
    runs = plan(folder, checkpoint, limit, args.batch_size, args.jobs)
    evaluate(runs, args.jobs)
    report(folder, [run.output for run in runs], args.output, limit, time.time() - started)


def build_data(folder: Path) -> Path:
    """Return the folder of easy-VQA converted to LLaVA's format and the test sets."""
    command = [sys.executable, str(ROOT / "train" / "easy_vqa.py"), "--output_dir", str(folder)]
    title = "data: easy-VQA's images as conversations and test sets"
    return make(folder, title, command, {"command": command[2:]}, {})


def finetune(data: Path, folder: Path, steps: int) -> Path:
    """Return the folder of the bundled tiny LLaVA as a Dynamic-LLaVA."""
    options = {**FINETUNE, "max_steps": str(steps), "output_dir": str(folder)}
    options |= {"data_path": str(data / "train.json"), "image_folder": str(data)}
    tiny = ROOT / "dynllava_plugin" / "assets" / "tiny_llava" / "model.safetensors"
    made_from = {"options": options, "preset": digest(PRESET), "start": digest(tiny)}
    made_from["data"] = digest(data / "train.json")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    command += ["--num_cpu_threads_per_process", str(os.cpu_count() or 1)]  # its own default is one thread
    command += [str(ROOT / "train" / "finetune.py"), str(PRESET)]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    title = "finetuning: the tiny LLaVA learns which image and output tokens to keep"
    return make(folder, title, [*command, "--overwrite_output_dir", "true"], made_from, KEEP_MEMORY)


def report(folder: Path, runs: list[Path], output: Path, limit: int | None, seconds: float) -> None:
    """Write table, chart and machine of the runs' folders in `folder`, each whole; the table is printed."""
    from dynllava_plugin.demo.chart import draw
    from dynllava_plugin.demo.summary import summary
    from dynllava_plugin.environment import host, versions

    table = read_results(folder, runs).drop(columns="file")
    text = summary(table)
    write_text(output / "table.csv", table.to_csv(index=False))
    machine: dict[str, Any] = {"host": host(), "versions": versions(), "questions": limit or "all"}
    write_json(output / "machine.json", {**machine, "seconds": round(seconds, 1)})
    facts = machine["host"]
    note = f"{facts['processor']}, {facts['cores']} cores; {limit or 'all'} questions of each benchmark"
    everything = render(table, "markdown")
    write_text(output / "table.md", f"{text}\n{everything}\nMachine: {note}; versions in machine.json.\n")
    draw(table, output / "chart.png")
    print(f"\n{text}\ntable, chart and machine: {output} ({seconds / 60:.1f} min)")


if __name__ == "__main__":
    sys.exit(main())
