"""The demo's evaluations: every setting in both harnesses, through the command lines that users type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynllava_plugin.demo.parts import KEEP_MEMORY, ROOT, PartFailed, digest, is_done, mark_done
from dynllava_plugin.errors import reason_in
from dynllava_plugin.evaluation.own_sets.easy_vqa import DATA_VARIABLE
from dynllava_plugin.evaluation.results.tables import LMMS_EVAL, VLMEVALKIT

CHECKPOINT = "dynamic_tiny"
SHORT, LONG = ("easy_vqa", "easy_vqa_scenes"), "easy_vqa_describe"
DATASETS = {"easy_vqa": "EasyVQA", "easy_vqa_scenes": "EasyVQA_Scenes", LONG: "EasyVQA_Describe"}


@dataclass(frozen=True)
class Setting:
    """One row of the table: the same checkpoint under other settings.

    Attributes
    ----------
    name : str
        As the table calls it.
    sparsity : dict
        Overrides, by `SparsityConfig`'s names.
    long : bool
        Whether it also describes scenes; the control's question is answered by the short answers.
    """

    name: str
    sparsity: dict[str, str]
    long: bool = False


RANDOM = {"mode": "image_text", "image_policy": "random"}
SETTINGS = (
    Setting("full", {"mode": "full"}, long=True),
    Setting("image", {"mode": "image"}, long=True),
    Setting("image_text", {"mode": "image_text"}, long=True),
    Setting("random", RANDOM),
    Setting("image_text@10%", {"mode": "image_text", "vision_keep_rate": "0.1"}),
    Setting("random@10%", {**RANDOM, "vision_keep_rate": "0.1"}),
)


@dataclass(frozen=True)
class Run:
    """One harness's command line for one setting.

    Attributes
    ----------
    harness : str
    setting : Setting
    command : list of str
    folder : Path
        Where its output and its log go.
    """

    harness: str
    setting: Setting
    command: list[str]
    folder: Path


def plan(folder: Path, checkpoint: str, limit: int | None, batch_size: int) -> list[Run]:
    """Every setting in both harnesses, the long runs first."""
    runs = []
    for setting in SETTINGS:
        tasks = [*SHORT, LONG] if setting.long else list(SHORT)
        limits = [] if limit is None else ["--limit", str(limit)]
        target = folder / LMMS_EVAL / setting.name
        model_args = ",".join(f"{k}={v}" for k, v in {"pretrained": checkpoint, **setting.sparsity}.items())
        lmms = [str(Path(sys.executable).with_name("lmms_eval")), "--model", "dynllava"]
        lmms += [
            "--model_args",
            model_args,
            "--tasks",
            ",".join(tasks),
            "--batch_size",
            str(batch_size),
            *limits,
        ]
        runs.append(Run(LMMS_EVAL, setting, [*lmms, "--output_path", str(target)], target))
        target = folder / VLMEVALKIT / setting.name
        kit = [
            sys.executable,
            str(ROOT / "run_vlmevalkit.py"),
            "--model",
            "dynllava",
            "--pretrained",
            checkpoint,
        ]
        kit += [part for k, v in setting.sparsity.items() for part in (f"--{k.replace('_', '-')}", v)]
        kit += ["--data", *(DATASETS[task] for task in tasks), "--batch-size", str(batch_size), *limits]
        runs.append(Run(VLMEVALKIT, setting, [*kit, "--work-dir", str(target)], target))
    return runs


def evaluate(runs: list[Run], data: Path, checkpoint: str, jobs: int) -> None:
    """All runs, `jobs` at a time with an equal share of the cores each.

    Parameters
    ----------
    runs : list of Run
    data : Path
        The converted easy-VQA.
    checkpoint : str
        What the runs evaluate; a folder's weights belong to what a finished run was made from.
    jobs : int

    Raises
    ------
    PartFailed
        Naming every run that failed, after the others have ended.
    """
    weights = [digest(path) for path in sorted(Path(checkpoint).glob("*.safetensors"))]
    made_from = {run.folder: {"command": run.command, "weights": weights} for run in runs}
    waiting = [run for run in runs if not is_done(run.folder, made_from[run.folder])]
    print(
        f"evaluation: {len(waiting)} runs"
        + (f", {len(runs) - len(waiting)} done before" if len(waiting) < len(runs) else "")
    )
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {DATA_VARIABLE: str(data), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **KEEP_MEMORY}
    failures = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(waiting), desc="evaluation", unit="run") as bar,
    ):
        pending: dict[Future[str | None], Run] = {
            pool.submit(_evaluate_one, run, environment, made_from[run.folder]): run for run in waiting
        }
        while pending:
            finished, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            for future in finished:
                run = pending.pop(future)
                bar.set_postfix_str(f"{run.setting.name} in {run.harness}")
                bar.update(1)
                if problem := future.result():
                    failures.append(problem)
            bar.refresh()
    if failures:
        raise PartFailed("; ".join(failures))


def _evaluate_one(run: Run, environment: dict[str, str], made_from: dict[str, Any]) -> str | None:
    """Run it; returns what went wrong, or None."""
    if run.folder.exists():
        shutil.rmtree(run.folder)  # an older checkpoint's, or half done
    run.folder.mkdir(parents=True)
    log = run.folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            run.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=ROOT,
            check=False,
        ).returncode
    if code == 0:
        mark_done(run.folder, made_from)
        return None
    reason = reason_in(log.read_text(encoding="utf-8", errors="replace"))
    return f"{run.setting.name} in {run.harness} ended with {code} ({reason}; see {log})"
