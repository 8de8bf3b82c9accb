"""`dynllava eval SUITE`: a suite of benchmarks in lmms-eval and VLMEvalKit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynllava_plugin.evaluation.benchmarks import HARNESSES
from dynllava_plugin.sparsity.config import IMAGE_POLICIES, MODES


def add_parser(commands: Any) -> None:
    """Add the subcommand to the ones of `dynllava`."""
    parser = commands.add_parser(
        "eval",
        help="a suite of benchmarks in both harnesses, resumable, with one table",
        epilog="A judge for MM-Vet and LLaVA-Wild: OPENAI_API_KEY, and --judge-url and --judge-model for "
        "another endpoint than OpenAI's.",
    )
    add = parser.add_argument
    add(
        "suite",
        type=Path,
        metavar="SUITE",
        help="a packaged one, e.g. understanding, or a file of your own, my.yaml",
    )
    add("--pretrained", metavar="CHECKPOINT", help="folder, hub id, or tiny")
    add("--harness", choices=(*HARNESSES, "both"), help="instead of the suite's (both where it says nothing)")
    add("--benchmarks", nargs="+", metavar="NAME", help="these instead of the suite's")
    add("--mode", action="append", choices=MODES, help="several times for several modes")
    add("--vision-keep-rate", type=float, help="share of image tokens to keep (default: the checkpoint's)")
    add("--text-keep-rate", type=float, help="written down with the run; how much text stays was learned")
    add("--image-policy", choices=IMAGE_POLICIES, help="who chooses the image tokens (default: learned)")
    add("--random-seed", type=int, help="of what is chosen by chance")
    add("--policy", help="instead of --mode and --image-policy, e.g. fastv,k=3,r=0.75")
    add("--system-prompt", help="what a chat template begins with instead of its own (not for LLaVA-1.5)")
    add("--min-pixels", type=int, help="an image is resized to at least so many (Qwen)")
    add("--max-pixels", type=int, help="and at most so many")
    add("--device", help="cpu, cuda, cuda:0 ... (default: the GPU where there is one)")
    add("--dtype", help="float32, bfloat16, float16 (default: the checkpoint's)")
    add("--attn-implementation", help="sdpa, eager, flash_attention_2")
    add("--quantization", choices=("8bit", "4bit"), help="the LLM's weights, through bitsandbytes")
    add("--limit", type=int, help="questions of each benchmark")
    add("--batch-size", type=int, help="in float32 it never changes an answer")
    add("--num-processes", type=int, help="GPUs (or processes) that share a benchmark's questions")
    add("--jobs", type=int, help="benchmarks at a time")
    add("--prompts", choices=("llava", "kit"), help="who words VLMEvalKit's questions")
    add("--data", type=Path, metavar="DIR", help="local datasets: DIR/datasets/<owner>/<name>, DIR/LMUData")
    add("--images", type=Path, metavar="DIR", help="images of the generation sets, e.g. coco/train2017")
    add("--judge-url", metavar="URL", help="OpenAI-compatible endpoint, ending in /v1")
    add("--judge-model", metavar="NAME", help="the model to ask there")
    add("--output", type=Path, metavar="DIR", help="default: results/<suite>")
    parser.set_defaults(run=_run)


_OWN = ("suite", "command", "run")


def _run(args: argparse.Namespace) -> int:
    return evaluate(args.suite, {key: value for key, value in vars(args).items() if key not in _OWN})


def evaluate(suite: Path, overrides: Mapping[str, Any]) -> int:
    """Carry out a suite, a file or a packaged one's name, with `overrides` (keys of `SuiteConfig`, None: as the file says).

    Returns
    -------
    int
        0, 1 where a run failed, 130 where it was stopped.

    Raises
    ------
    UserError
        For a setting that is wrong, before anything runs.
    """
    from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL
    from dynllava_plugin.evaluation.judges import MODEL, URL, find_judge
    from dynllava_plugin.evaluation.results.footer import count_of_runs
    from dynllava_plugin.evaluation.suite.config import SuiteConfig
    from dynllava_plugin.evaluation.suite.report import report
    from dynllava_plugin.evaluation.suite.runner import Runner
    from dynllava_plugin.evaluation.suite.runs import plan
    from dynllava_plugin.model.checkpoints import check_settings

    config = SuiteConfig.read(suite, overrides)
    given = {URL: config.judge_url, MODEL: config.judge_model}
    os.environ |= {name: value for name, value in given.items() if value}
    for settings in config.settings():
        check_settings(
            settings.pretrained,
            device=settings.device,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            quantization=settings.quantization,
            **settings.sparsity(),
        )
    if config.left_out():
        names = ", ".join(benchmark.name for benchmark in config.left_out())
        print(f"left out, {config.harness} has no task for them: {names}", file=sys.stderr, flush=True)
    judged = [task for benchmark in config.wanted() for task in benchmark.tasks(LMMS_EVAL)]
    runs = plan(config, find_judge(LMMS_EVAL, judged))
    print(f"{count_of_runs(len(runs))} into {config.output}", flush=True)
    try:
        outcomes = Runner(runs, config.jobs, config.data, lambda line: print(line, flush=True)).run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return report(config, outcomes)
