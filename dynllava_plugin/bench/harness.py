"""`dynllava bench harness`: questions a second of a benchmark in each harness, one at a time and in batches.

Every run is the harness's own command line in a process of its own; the runs take turns, so that a slow minute slows all
of them. What is measured begins with the first question: start-up is loading, which other tables have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynllava_plugin import processes
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.errors import UserError, reason_in
from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, find_benchmark
from dynllava_plugin.evaluation.results.identity import resolve_checkpoint
from dynllava_plugin.evaluation.results.manifest import NAME as MANIFEST_NAME
from dynllava_plugin.evaluation.results.predictions import lmms_eval_predictions, vlmevalkit_predictions
from dynllava_plugin.evaluation.settings import ModelSettings, module_and_arguments
from dynllava_plugin.files import read_json


def run(args: argparse.Namespace) -> int:
    """Measure a row for each run of a harness; return 130 where the user interrupts, with the rows so far kept."""
    batches = sorted(set(args.batch))
    if 1 not in batches:
        raise UserError(f"--batch: {args.batch} must have 1 in it, to compare with")
    benchmark = find_benchmark(args.benchmark)
    for harness in args.harness:
        if len(benchmark.tasks(harness)) != 1:
            raise UserError(f"--benchmark: {args.benchmark} isn't one task in {harness}; take another")
    common = {
        "phase": "harness",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "checkpoint": Path(args.pretrained).name,
        "checkpoint_hash": resolve_checkpoint(args.pretrained),
        "policy": args.policy or "the checkpoint's own",
        "benchmark": args.benchmark,
        "limit": args.limit,
    }
    rows = Rows.of(args, common, "harness", "answering_s")
    plan = [(r, h, b) for r in range(args.repeats) for h in args.harness for b in batches]

    def work() -> None:
        with tempfile.TemporaryDirectory(prefix="dynllava-bench-") as folder:
            for repeat, harness, batch in tqdm(plan, desc="harness runs", unit="run"):
                about = {"harness": harness, "batch": batch, "repeat": repeat}
                if not rows.has([about]):
                    target = Path(folder) / f"{harness}_{batch}_{repeat}"
                    rows.add(**about, **_measure(args, harness, batch, benchmark.tasks(harness)[0], target))

    return rows.carry_out(work, args.output)


def _measure(args: argparse.Namespace, harness: str, batch: int, task: str, folder: Path) -> dict[str, Any]:
    """Seconds since the first question, of these in the engine, of these in the model; what was answered, as a hash."""
    folder.mkdir(parents=True)
    settings = ModelSettings.from_dict({"pretrained": args.pretrained, "policy": args.policy})
    asked = module_and_arguments(harness, settings, [task], batch, folder, args.limit)
    log, started, command = folder / "log.txt", time.perf_counter(), [sys.executable, "-m", *asked]
    code = processes.run(command, log)
    seconds = time.perf_counter() - started
    manifests = sorted(folder.rglob(f"*{MANIFEST_NAME}"))
    if code or not manifests:
        reason = reason_in(log.read_text(encoding="utf-8", errors="replace"))
        raise UserError(f"{harness}, batch {batch}: ended with {code} ({reason})")
    manifest = read_json(manifests[-1])
    read = lmms_eval_predictions if harness == LMMS_EVAL else vlmevalkit_predictions
    predictions = read(folder, task)
    times = manifest["engine_seconds"]
    return {
        "questions": len(predictions),
        "answering_s": times["answering"],
        "engine_s": times["engine"],
        "model_s": times["model"],
        "process_s": round(seconds, 3),
        "questions_per_s": len(predictions) / times["answering"],
        "shared_prompts": manifest["shared_prompts"],
        "predictions": hashlib.sha256(json.dumps(list(predictions.values())).encode()).hexdigest()[:16],
    }
