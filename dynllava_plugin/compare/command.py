"""`dynllava compare`: every policy, share and task on one checkpoint; one table and its plots."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynllava_plugin.errors import UserError

if TYPE_CHECKING:
    from dynllava_plugin.compare.subjects import Subject

LONG = "easy_vqa_describe"
TIMED_SAMPLES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--pretrained", default="tiny", help="checkpoint folder, hub id, or tiny (default: %(default)s)")
    add(
        "--policies", nargs="+", metavar="POLICY",
        help="as for the harnesses, e.g. full image_text fastv,k=2 (default: every way to have fewer image tokens)",
    )  # fmt: skip
    add(
        "--keep", nargs="+", type=float, default=[0.4, 0.2, 0.1], metavar="SHARE",
        help="shares of the image tokens that stay (of H2O's cache); a policy with a budget of its own has only that",
    )  # fmt: skip
    add("--tasks", nargs="+", default=["easy_vqa_scenes"], help="our benchmarks or lmms-eval's tasks")
    add("--limit", type=int, help="questions of each task (default: all)")
    add("--batch-size", "--batch_size", type=int, default=32, help="(default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:0, ...")
    add("--dtype", help="float32, bfloat16, float16")
    add("--attn-implementation", "--attn_implementation", help="sdpa, eager, flash_attention_2")
    add(
        "--repeats",
        type=int,
        default=9,
        help="timed prefills of each sample; 0 measures no time (default: %(default)s)",
    )
    add("--output", type=Path, default=Path("results/compare"), help="(default: %(default)s)")
    add("--fresh", action="store_true", help="measure again what an earlier run has left in OUTPUT/runs")


def run(args: argparse.Namespace) -> int:
    """Measure what isn't measured yet, then write table and plots over all of it."""
    for flag in ("limit", "batch_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: {getattr(args, flag)} is not positive")
    if args.repeats < 0:
        raise UserError(f"--repeats: {args.repeats} is negative")

    from dynllava_plugin.compare.answers import Harness, task_names
    from dynllava_plugin.compare.store import Store, figures_to_json
    from dynllava_plugin.compare.subjects import DEFAULT_POLICIES, subjects
    from dynllava_plugin.evaluation.engine.engine import Engine
    from dynllava_plugin.evaluation.engine.prompting import VICUNA
    from dynllava_plugin.evaluation.settings import ModelSettings

    settings = ModelSettings(
        args.pretrained, device=args.device, dtype=args.dtype, attn_implementation=args.attn_implementation
    )
    engine = Engine.load(settings, args.batch_size)
    if engine.style is not VICUNA:
        raise UserError(
            f"--pretrained {args.pretrained}: compare takes LLaVA-1.5 with Vicuna's Llama only; the harnesses' commands "
            "take every family and policy"
        )
    config = engine.model.config
    policies, layers = args.policies or DEFAULT_POLICIES, config.text_config.num_hidden_layers
    wanted = subjects(policies, args.keep, config.sparsity, layers)
    for subject in wanted:
        policy = subject.of(config.sparsity).of_depth(layers)
        engine.model.check_family(policy)
        engine.model.check_images(policy, config)
    tasks = task_names(args.tasks)
    made_from = {
        "checkpoint": _fingerprint(engine, settings),
        "dtype": str(engine.model.dtype),
        "device": str(engine.model.device),
        "attention": config._attn_implementation,
    }
    store = Store(args.output / "runs", made_from)
    harness = Harness(tasks, args.limit)
    base = config.sparsity
    for number, subject in enumerate(wanted, 1):
        for task in tasks:
            of = {"task": task, "limit": args.limit}
            if not args.fresh and store.read(task, subject, **of):
                continue
            print(f"[{number}/{len(wanted)}] {_name(subject)}: {task}", flush=True)
            config.text_config.sparsity = subject.settings(base)
            harness.tasks = [task]
            # A new engine: it may keep image features, and they may depend on the policy.
            figures = harness.figures(Engine(engine.model, engine.processor, args.batch_size), settings)
            costs = _costs(engine, subject.of(base), figures, args, task)
            store.write(task, subject, {**figures_to_json(figures), "costs": costs}, **of)
    config.text_config.sparsity = base
    if args.repeats:
        _time(engine, wanted, harness, tasks, store, args)
    _report(store, args)
    return 0


def _name(subject: Subject) -> str:
    return subject.name if subject.keep is None else f"{subject.name} at {subject.keep:.0%}"


def _fingerprint(engine: Any, settings: Any) -> str:
    """The checkpoint's name and a digest of its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(engine.model.state_dict().items()):
        flat = tensor.detach().flatten()
        # Large checkpoints: a thousand numbers of each tensor tell two trainings apart.
        digest.update(name.encode() + flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy().tobytes())
    return f"{settings.checkpoint_name} {digest.hexdigest()[:12]}"


def _costs(
    engine: Any, policy: Any, figures: Sequence[Any], args: argparse.Namespace, task: str
) -> dict[str, Any]:
    """By benchmark: what the table calls costs."""
    from dynllava_plugin.compare.long_answers import reference_cache_kib
    from dynllava_plugin.evaluation.engine.prefill_costs import prefill_costs
    from dynllava_plugin.flops import DecoderShape

    shape = DecoderShape.of(engine.model.config.text_config)
    costs: dict[str, Any] = {f.benchmark: prefill_costs(shape, policy, f.counts) for f in figures}
    if task.startswith(LONG):
        costs.setdefault(LONG, {})["cache_kib"] = reference_cache_kib(engine, args.limit)
    return costs


def _time(
    engine: Any, wanted: list[Subject], harness: Any, tasks: list[str], store: Any, args: argparse.Namespace
) -> None:
    """Prefill times of all wanted policies in one interleaved run a task."""
    from dynllava_plugin.compare.costs import prefill_times

    for task in tasks:
        of = {"task": task, "repeats": args.repeats, "with": [_name(subject) for subject in wanted]}
        if not args.fresh and all(store.read(f"{task}_time", subject, **of) for subject in wanted):
            continue
        inputs = harness.single_inputs(engine, task, TIMED_SAMPLES)
        print(f"prefill time on {len(inputs)} samples of {task}, {args.repeats} turns", flush=True)
        for subject, times in prefill_times(engine, wanted, inputs, args.repeats).items():
            store.write(f"{task}_time", subject, {"times": times}, **of)


def _report(store: Any, args: argparse.Namespace) -> None:
    from dynllava_plugin.compare.report import draw, make_table, to_markdown
    from dynllava_plugin.compare.store import figures_from_json
    from dynllava_plugin.environment import host, versions
    from dynllava_plugin.files import write_json, write_text

    measured = []
    kinds = sorted(
        path.name for path in store.folder.iterdir() if path.is_dir() and not path.name.endswith("_time")
    )
    for kind in kinds:
        times = {subject: content["times"] for subject, content in store.everything(f"{kind}_time")}
        for subject, content in store.everything(kind):
            figures = figures_from_json(content)
            costs = {name: {**values, **times.get(subject, {})} for name, values in content["costs"].items()}
            measured.append((subject, figures, costs))
    table = make_table(measured)
    checkpoint = store.made_from["checkpoint"].split()[0]
    facts = host()
    note = f"Checkpoint: {checkpoint}. Machine: {facts['processor']}, {facts['threads']} threads of {facts['cores']} cores. "
    note += "Intervals: bootstrap over questions, paired between policies. Prefill: pixels to first logits, one sample."
    text = to_markdown(table)
    write_text(args.output / "table.csv", table.to_csv(index=False))
    write_text(args.output / "table.md", f"{text}\n{note}\n")
    write_json(
        args.output / "machine.json",
        {"host": facts, "versions": versions(), "threads": os.environ.get("OMP_NUM_THREADS")},
    )
    for benchmark, metric in dict.fromkeys(zip(table["benchmark"], table["metric"], strict=True)):
        draw(table, benchmark, metric, args.output / f"{benchmark}_{metric}.png")
    print(f"\n{text}\ntable and plots: {args.output}")
