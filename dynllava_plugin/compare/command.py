"""`dynllava compare`: every policy, budget and benchmark on one checkpoint; the field's table, what papers claim, and a picture."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dynllava_plugin.errors import UserError, check_installed
from dynllava_plugin.evaluation.options import add_flags
from dynllava_plugin.evaluation.settings import ModelSettings, settings_named

if TYPE_CHECKING:
    from dynllava_plugin.compare.answers import Harness
    from dynllava_plugin.compare.measuring import Comparison
    from dynllava_plugin.compare.subjects import Subject
    from dynllava_plugin.evaluation.benchmarks import Benchmark

DEFAULT_KEEP = (0.4, 0.2, 0.1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = "Several GPUs: accelerate launch --num_processes N -m dynllava_plugin.cli compare ..."
    add = parser.add_argument
    add(
        "--pretrained", nargs="+", default=["tiny"], metavar="CKPT",
        help="checkpoint folder, hub id, or tiny; more of them are other trainings of the same model, asked under full context and "
        "the learned policies for their mean and spread (default: tiny)",
    )  # fmt: skip
    add(
        "--policies", nargs="+", metavar="POLICY", default=["all"],
        help="as for the harnesses, e.g. full image_text fastv,k=2; or all, those that can run (default: all)",
    )  # fmt: skip
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--tokens", nargs="+", type=float, metavar="N",
        help="image tokens, mean over the LLM's layers, as papers count: 192 128 64",
    )  # fmt: skip
    budget.add_argument(
        "--keep", nargs="+", type=float, metavar="SHARE",
        help="shares of the image tokens that stay (of H2O's cache) (default: 0.4 0.2 0.1)",
    )  # fmt: skip
    add(
        "--hard", action="store_true",
        help="adds downsample at each budget, and with it figures on the questions that it gets wrong and full context right",
    )  # fmt: skip
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--suite", type=Path, help="the benchmarks of a suite, e.g. understanding, in lmms-eval"
    )
    asked.add_argument(
        "--tasks", nargs="+", default=["easy_vqa_scenes"], help="our benchmarks or lmms-eval's tasks"
    )
    add("--data", type=Path, metavar="DIR", help="local datasets: DIR/datasets/<owner>/<name>")
    add("--batch-size", "--batch_size", type=int, default=32, help="(default: %(default)s)")
    add_flags(parser, settings_named("limit", "device", "dtype", "attn_implementation"))
    add(
        "--repeats", type=int, default=9,
        help="timed prefills of each sample; 0 measures no time (default: %(default)s)",
    )  # fmt: skip
    add("--output", type=Path, default=Path("results/compare"), help="(default: %(default)s)")
    add("--fresh", action="store_true", help="measure again what an earlier run has left in OUTPUT/runs")


def run(args: argparse.Namespace) -> int:
    """Measure what isn't measured yet, then write tables and picture over all of it."""
    from dynllava_plugin.evaluation.locks import terminated_like_interrupted
    from dynllava_plugin.files import check_folder

    check_installed("compare", "eval", "lmms_eval")
    for flag, least in (("limit", 1), ("batch_size", 1), ("repeats", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(
                f"--{flag.replace('_', '-')}: {value} is {'negative' if least == 0 else 'not positive'}"
            )
    device = _device() if args.device is None else args.device
    settings = [
        ModelSettings(name, device=device, dtype=args.dtype, attn_implementation=args.attn_implementation)
        for name in args.pretrained
    ]
    for one in settings:
        one.check()
    check_folder("--output", args.output)
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        with terminated_like_interrupted():
            return _compare(args, settings, first)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _compare(args: argparse.Namespace, settings: list[ModelSettings], first: bool) -> int:
    from dynllava_plugin.compare.subjects import ALL, DEFAULT_POLICIES, FULL, KEEP, TOKENS, runnable, subjects

    listed = args.policies == [ALL]
    kind, budgets = (TOKENS, args.tokens) if args.tokens else (KEEP, args.keep or DEFAULT_KEEP)
    policies = list(DEFAULT_POLICIES if listed else args.policies)
    needed = [name for name in (FULL, "downsample") if args.hard and name not in policies]
    found = subjects([*policies, *needed], kind, budgets)
    benchmarks = _benchmarks(args)

    from dynllava_plugin.compare.answers import Harness
    from dynllava_plugin.evaluation.locks import locks
    from dynllava_plugin.evaluation.results.identity import resolve_checkpoint
    from dynllava_plugin.evaluation.suite.data import HUB
    from dynllava_plugin.policies.base import SQUARE

    digests = [resolve_checkpoint(one.pretrained) for one in settings]
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            raise UserError(
                f"--pretrained: {settings[number].pretrained} is there twice; name other trainings"
            )
    learned = [subject for subject in found if subject.learned]
    if len(settings) > 1 and not learned:
        raise UserError(
            "--pretrained: several trainings differ in learned policies, and --policies names none"
        )
    local = args.data / HUB if args.data and (args.data / HUB).is_dir() else None
    harness = Harness(benchmarks, args.limit, local)
    comparisons: list[Comparison] = []
    able: list[list[Subject]] = []
    reasons: dict[str, list[str]] = {}
    for one, digest in zip(settings, digests, strict=True):
        comparison = _loaded(args, one, digest, harness, first)
        asked = [subject for subject in found if not able or subject.name == FULL or subject in learned]
        # Images of one size were checked against the config; of others the first ones have to do.
        varied = [] if SQUARE in comparison.engine.model.gives else benchmarks
        samples = [sample for item in varied for sample in harness.inputs(comparison.engine, item, 1)]
        try:
            wanted, left = runnable(asked, comparison.engine.model, listed, samples)
        except UserError as error:
            raise error if len(settings) == 1 else UserError(f"{one.pretrained}: {error}") from None
        comparisons.append(comparison)
        able.append(wanted)
        reasons |= left
    if first:
        print("".join(f"left out, {line}\n" for line in _lines(reasons)), end="", flush=True)
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    with locks({args.output} if first else set(), "another `dynllava compare`"):
        for comparison, wanted in zip(comparisons, able, strict=True):
            if first and len(comparisons) > 1:
                print(f"{comparison.checkpoint}:", flush=True)
            reasons |= comparison.measure(wanted, benchmarks, args.fresh, lenient=listed and alone)
        if first:
            if args.repeats:
                comparisons[0].time(able[0], benchmarks, args.repeats, args.fresh)
            _report(comparisons, args, _lines(reasons))
    return 0


def _loaded(
    args: argparse.Namespace, settings: ModelSettings, digest: str, harness: Harness, first: bool
) -> Comparison:
    from dynllava_plugin.compare.measuring import Comparison
    from dynllava_plugin.compare.store import Store
    from dynllava_plugin.evaluation.engine.engine import Engine

    engine = Engine.load(settings, args.batch_size)
    made_from = {
        "checkpoint": f"{settings.checkpoint_name} {digest}",
        "dtype": str(engine.model.dtype),
        "device": engine.model.device.type,
        "attention": engine.model.config._attn_implementation,
    }
    return Comparison(engine, settings, harness, Store(args.output / "runs", made_from), args.limit, first)


def _lines(reasons: dict[str, list[str]]) -> list[str]:
    return [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]


def _device() -> str | None:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None


def _benchmarks(args: argparse.Namespace) -> list[Benchmark]:
    """The benchmarks that lmms-eval has and scores by itself, with their data here or within reach."""
    from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, find_benchmark
    from dynllava_plugin.evaluation.suite.config import SuiteConfig
    from dynllava_plugin.evaluation.suite.data import how_to_provide, is_offline, is_ours, locate

    if args.suite:
        given = {
            "pretrained": args.pretrained[0],
            "harness": LMMS_EVAL,
            "data": args.data,
            "limit": args.limit,
        }
        found = SuiteConfig.read(args.suite, given).wanted()
    else:
        found = list(dict.fromkeys(find_benchmark(name) for name in args.tasks))
    able = [item for item in found if item.tasks(LMMS_EVAL) and not (item.judge or item.server)]
    without = ", ".join(item.name for item in found if item not in able)
    if without:
        print(f"left out, lmms-eval alone can't score them: {without}", flush=True)
    if not able:
        raise UserError("--tasks: nothing is left to compare")
    if (args.limit or 0) % 2 and any(item.name == "MME" for item in able):
        raise UserError(f"--limit: {args.limit} cuts one of MME's pairs of questions; give an even number")
    for item in able:
        if is_offline() and not is_ours(item) and locate(item, LMMS_EVAL, args.data) is None:
            raise UserError(f"{item.name}: {how_to_provide(item, LMMS_EVAL)}")
    return able


def _report(comparisons: list[Comparison], args: argparse.Namespace, left_out: list[str]) -> None:
    from dynllava_plugin.compare.literature import published
    from dynllava_plugin.compare.picture import draw, draw_policies
    from dynllava_plugin.compare.report import claims_table, field_table, make_table
    from dynllava_plugin.compare.subjects import FULL
    from dynllava_plugin.environment import host, versions
    from dynllava_plugin.files import write_json, write_text

    table = make_table(*(comparison.everything() for comparison in comparisons))
    whole = table.loc[table["policy"] == FULL, "image_tokens"].max()
    found = published(comparisons[0].family, args.tokens or [], whole)
    claims = claims_table(found, list(dict.fromkeys(table["benchmark"])))
    facts = host()
    notes = [f"* not measured, {line}" for line in left_out]
    notes += [
        f"* Checkpoint: {', '.join(one.checkpoint for one in comparisons)}.",
        f"* Machine: {facts['processor']}, {facts['threads']} threads of {facts['cores']} cores.",
        "* Intervals: 95%, bootstrap over questions, paired between policies.",
    ]
    if table["prefill_ms"].notna().any():
        notes += ["* Prefill ms: pixels to first logits, one sample."]
    if len(comparisons) > 1:
        notes += ["* Of several checkpoints: their mean, and in brackets the lowest and the highest."]
    text = field_table(table) + "\n" + "\n".join(notes) + "\n"
    if claims:
        text += f"\nWhat papers claim, in percent of the full model's score, by their own choice of benchmarks:\n\n{claims}"
    write_text(args.output / "table.csv", table.to_csv(index=False))
    write_text(args.output / "table.md", text)
    threads = os.environ.get("OMP_NUM_THREADS")
    write_json(args.output / "machine.json", {"host": facts, "versions": versions(), "threads": threads})
    draw(table, args.output / "picture.png")
    draw_policies(table, args.output / "policies.png")
    print(f"\n{text}\ntables and pictures: {args.output}")
