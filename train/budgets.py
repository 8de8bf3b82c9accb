"""Compare one checkpoint for every budget, one checkpoint a budget, and several gates at equal equivalent tokens; see `--help`.

Rows are appended to `OUTPUT/budgets_rows.csv` as they are measured, and a run that was stopped goes on from them; then
`budgets.csv` has mean and spread over seeds, `budgets.png` the picture.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: find `train` and `dynllava_plugin` from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from dynllava_plugin import load_model
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.engine.requests import Generation, Request
from dynllava_plugin.evaluation.own_sets.easy_vqa import (
    DATA_VARIABLE,
    exact_match,
    load_rows,
    question_text,
)
from dynllava_plugin.files import check_folder, write_figure, write_text
from dynllava_plugin.model.prompts import vicuna_v1, with_images
from train import finetune

BUDGETS = (0.4, 0.2, 0.1, 0.05)
EVERY, ONE, GATES = "one for all", "one each", "two gates each"
RUN = ("model", "benchmark", "questions", "steps")
COLUMNS = (*RUN, "seed", "trained", "flags", "budget", "tokens", "accuracy")
# The demo's preset: larger steps than the paper's, whose rates suit 665K samples.
PRESET = str(Path(__file__).parent / "configs" / "tiny.yaml")
RECIPE = "--held_out 0 --dataloader_num_workers 0 --save_strategy no --mode image --use_cpu true".split()


def trainings(budgets: tuple[float, ...]) -> Iterator[tuple[str, list[str], tuple[float, ...]]]:
    """Yield what is trained: its kind, its flags, and the budgets (shares behind one gate at layer 2) that it is asked at.

    Of two gates at layers 2 and 4 of six, 1.5 r and then a third leave as many tokens in the mean over layers as r at one.
    """
    yield EVERY, ["--vision_keep_rate", "0.05:0.6"], budgets
    for rate in budgets:
        yield ONE, ["--vision_keep_rate", str(rate)], (rate,)
    for rate in budgets:
        yield GATES, ["--gates", f"2:{1.5 * rate:.4g},4:0.3334"], (rate,)


def main(arguments: list[str] | None = None) -> int:
    """Train and measure what isn't there yet, then write the summary; returns the exit status."""
    try:
        compare(parse_arguments(arguments))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that train/easy_vqa.py wrote")
    add("--train_file", default="train.json", help="the mixture in it (default: %(default)s)")
    add(
        "--benchmark", default="easy_vqa_scenes", help="whose test questions are asked (default: %(default)s)"
    )
    add("--model", default="tiny", help="where training starts from (default: %(default)s)")
    add("--steps", type=int, default=140, help="optimiser steps of each training (default: %(default)s)")
    add(
        "--seeds", type=int, nargs="+", default=[0, 1, 2],
        help="of the trainings of each kind; several processes may share them out (default: 0 1 2)",
    )  # fmt: skip
    add("--limit", type=int, default=1000, help="questions (default: %(default)s)")
    add("--work", type=Path, default=Path("outputs/budgets"), help="checkpoints (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("results/training"),
        help="rows, summary, picture (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    for flag in ("steps", "limit"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be positive")
    return args


def compare(args: argparse.Namespace) -> None:
    """Measure every training at its budgets, seed by seed."""
    for flag in ("output", "work"):
        check_folder(f"--{flag}", getattr(args, flag))
    os.environ[DATA_VARIABLE] = str(args.data)
    questions = load_rows(args.benchmark)[: args.limit]
    file = args.output / "budgets_rows.csv"
    for seed in args.seeds:
        for kind, flags, budgets in trainings(BUDGETS):
            about = {
                "model": args.model, "benchmark": args.benchmark, "questions": len(questions),
                "steps": args.steps, "seed": seed, "trained": kind, "flags": " ".join(flags),
            }  # fmt: skip
            missing = [budget for budget in budgets if not measured(file, {**about, "budget": budget})]
            if missing:
                run = (Path(args.model).name, args.benchmark, args.steps, seed, *flags)
                checkpoint = args.work / "-".join(str(part).strip("-") for part in run)
                train(args, checkpoint, flags, seed)
                for row in rows(checkpoint, args.benchmark, questions, kind, missing):
                    append(file, {**about, **row})
    summarise(pd.read_csv(file), args.output)


def train(args: argparse.Namespace, checkpoint: Path, flags: list[str], seed: int) -> None:
    """Run one training by the command that users type; leave one that is there already alone."""
    data = ["--data_path", str(args.data / args.train_file), "--image_folder", str(args.data)]
    place = ["--data_cache", str(args.work / "cache"), "--output_dir", str(checkpoint), "--seed", str(seed)]
    start = ["--model_name_or_path", args.model, "--max_steps", str(args.steps)]
    if finetune.main([PRESET, *start, *data, *place, *RECIPE, *flags]):
        raise UserError(f"{checkpoint}: its training ended with an error, see above")


def rows(
    checkpoint: Path, benchmark: str, questions: list[dict[str, str]], kind: str, budgets: list[float]
) -> Iterator[dict[str, Any]]:
    """Yield accuracy in percent and equivalent image tokens at each budget."""
    model, processor = load_model(checkpoint, device="cpu")
    requests = [
        Request(
            vicuna_v1([(with_images(question_text(benchmark, row["question"])), None)]),
            (row["image"],), row["id"],
        )
        for row in questions
    ]  # fmt: skip
    for budget in budgets:
        if kind == EVERY:
            model.set_sparsity(vision_keep_rate=budget)
        answers = Engine(model, processor, 32).generate(
            requests, Generation.from_task({"max_new_tokens": 16})
        )
        right = sum(exact_match(a.text, row["answer"]) for a, row in zip(answers, questions, strict=True))
        policy, total = model._llm.policy, model.config.image_seq_length
        layers = model.config.text_config.num_hidden_layers
        tokens = policy.image_tokens(total, policy.kept_tokens(total), layers)
        yield {"budget": budget, "tokens": round(tokens, 3), "accuracy": round(100 * right / len(answers), 2)}


def measured(file: Path, about: dict[str, Any]) -> bool:
    """Return whether the rows hold this one."""
    if not file.exists():
        return False
    table = pd.read_csv(file, dtype=str)
    return bool((table[list(about)] == pd.Series(about).astype(str)).all(axis=1).any())


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a row, and say it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row], columns=COLUMNS).to_csv(file, mode="a", header=not file.exists(), index=False)
    print(*(row[name] for name in COLUMNS), flush=True)


def summarise(table: pd.DataFrame, output: Path) -> None:
    """Write mean, spread and number over seeds, and the picture of the run that the last row is of."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = list(RUN)
    keys = [*run, "trained", "budget", "tokens"]
    summary = table.groupby(keys, sort=False)["accuracy"].agg(["mean", "std", "count"]).round(2).reset_index()
    write_text(output / "budgets.csv", summary.to_csv(index=False))
    last = table.iloc[-1][run]
    shown = summary[(summary[run] == last).all(axis=1)]
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    # Marks of three sizes: lines of the same figures don't hide each other.
    for (kind, part), (mark, size) in zip(
        shown.groupby("trained", sort=False), (("o", 10), ("s", 6), ("x", 8)), strict=False
    ):
        ordered, bars = part.sort_values("tokens"), {"capsize": 3, "markersize": size, "mfc": "none"}
        axis.errorbar(
            ordered["tokens"], ordered["mean"], ordered["std"].fillna(0), marker=mark, label=kind, **bars
        )
        rows = table[(table[run] == last).all(axis=1) & (table["trained"] == kind)]
        color = axis.get_lines()[-1].get_color()
        axis.scatter(rows["tokens"], rows["accuracy"], s=8, color=color, alpha=0.5, zorder=3)
    axis.set_xlabel("image tokens, mean over layers")
    axis.set_ylabel("accuracy [%]")
    seeds = int(shown["count"].max())
    spread = f"mean and standard deviation of {seeds} seeds (dots)" if seeds > 1 else "one seed"
    axis.set_title(
        f"{last['model']}, {last['benchmark']}, {last['questions']} questions, {last['steps']} steps\n{spread}",
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    write_figure(output / "budgets.png", figure)


if __name__ == "__main__":
    sys.exit(main())
