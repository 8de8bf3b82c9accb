"""Both harnesses through the commands that users type, on the same few rows with the bundled model."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.results.results import read_results
from tests import commands
from tests.commands import Finished, run_command

ROOT = Path(__file__).resolve().parents[1]
LMMS_EVAL = str(Path(sys.executable).with_name("lmms_eval"))
LIMIT = 4


def typed(command: list[str], folder: Path, data: Path) -> Finished:
    env = {**os.environ, "DYNLLAVA_EASY_VQA": str(data), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    return Finished(done.returncode, done.stdout, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harnesses")


@pytest.fixture(scope="module")
def lmms(folder: Path, easy_vqa_folder: Path) -> Finished:
    """As issue 2 types it, plus a limit, the other tasks and the answers."""
    command = [LMMS_EVAL, "--model", "dynllava", "--model_args", "pretrained=tiny"]
    command += ["--tasks", "easy_vqa,easy_vqa_scenes,easy_vqa_describe", "--limit", str(LIMIT)]
    return typed(
        [*command, "--log_samples", "--batch_size", "4", "--output_path", "lmms"], folder, easy_vqa_folder
    )


@pytest.fixture(scope="module")
def kit(folder: Path, easy_vqa_folder: Path) -> Finished:
    command = [sys.executable, str(ROOT / "run_vlmevalkit.py"), "--model", "dynllava", "--pretrained", "tiny"]
    command += ["--data", "EasyVQA", "EasyVQA_Scenes", "EasyVQA_Describe", "--limit", str(LIMIT)]
    return typed(
        [*command, "--batch-size", "3", "--mode", "image_text", "--mode", "all"], folder, easy_vqa_folder
    )


def kit_answers(kit: Finished, dataset: str) -> pd.DataFrame:
    path = next(kit.folder.glob(f"results/vlmevalkit/tiny*/dynllava/dynllava_{dataset}.tsv"))
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def lmms_answers(lmms: Finished, task: str) -> list[str]:
    path = next(lmms.folder.glob(f"lmms/*/*_samples_{task}.jsonl"))
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def test_both_end_well_and_say_where_the_results_are(lmms: Finished, kit: Finished) -> None:
    assert lmms.code == 0, lmms.text[-3000:]
    assert kit.code == 0, kit.text[-3000:]
    assert "exact_match" in lmms.text and "results: lmms" in lmms.text
    assert "results: results/vlmevalkit/tiny_mode-image_text_limit-4" in kit.text


@pytest.mark.parametrize(
    ("task", "dataset"),
    [
        ("easy_vqa", "EasyVQA"),
        ("easy_vqa_scenes", "EasyVQA_Scenes"),
        ("easy_vqa_describe_answer", "EasyVQA_Describe"),
    ],
)
def test_same_rows_and_answers_in_both(
    lmms: Finished, kit: Finished, task: str, dataset: str, easy_vqa_data: Path
) -> None:
    rows = easy_vqa.load_rows(task.removesuffix("_answer"))[:LIMIT]
    answers = kit_answers(kit, dataset)
    assert list(answers["index"]) == [row["id"] for row in rows]
    assert lmms_answers(lmms, task) == list(answers["prediction"])
    assert any(answers["prediction"])


def test_one_table_over_both(lmms: Finished, kit: Finished) -> None:
    table = read_results(lmms.folder)
    assert set(table["checkpoint"]) == {"tiny"} and set(table["mode"]) == {"image_text"}
    assert set(table["n"]) == {LIMIT}
    for _, pair in table.groupby(["benchmark", "metric"]):
        assert sorted(pair["harness"]) == ["lmms-eval", "vlmevalkit"]
        first, second = pair["value"]
        assert first == pytest.approx(second, rel=1e-4)
    assert {"easy_vqa", "easy_vqa_scenes", "easy_vqa_describe"} == set(table["benchmark"])
    assert set(table["kept_image_tokens"]) == {int(0.2 * table["image_tokens"].iloc[0])}
    long = table[table["benchmark"] == "easy_vqa_describe"]
    assert long["kept_output_share"].between(0, 1).all() and (long["generated_tokens"] > 2).all()


def test_scores_follow_from_the_answers(lmms: Finished, kit: Finished, easy_vqa_data: Path) -> None:
    table = read_results(lmms.folder)
    for name, dataset in (("easy_vqa", "EasyVQA"), ("easy_vqa_scenes", "EasyVQA_Scenes")):
        answers = kit_answers(kit, dataset)["prediction"]
        truth = [row["answer"] for row in easy_vqa.load_rows(name)[:LIMIT]]
        hits = [a.lower().strip().rstrip(".") == t for a, t in zip(answers, truth, strict=True)]
        assert set(table[table["benchmark"] == name]["value"]) == {100 * sum(hits) / LIMIT}
    records = [ast.literal_eval(text) for text in kit_answers(kit, "EasyVQA_Describe")["extra_records"]]
    mean = sum(record["ppl"] for record in records) / LIMIT
    assert table[table["metric"] == "ppl"]["value"].to_list() == pytest.approx([mean] * 2, rel=1e-4)


def test_manifest(lmms: Finished, kit: Finished) -> None:
    for path in (
        next(lmms.folder.glob("lmms/**/*dynllava_run.json")),
        next(kit.folder.rglob("dynllava_run.json")),
    ):
        manifest = json.loads(path.read_text())
        assert manifest["settings"]["pretrained"] == "tiny" and manifest["sparsity"]["mode"] == "image_text"
        assert manifest["versions"]["torch"] and manifest["host"]["cores"] and manifest["seconds"] > 0
        assert all(counts["n"] == LIMIT for counts in manifest["tokens"].values())


@pytest.fixture(scope="module")
def broken_data(easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of the scenes' first rows is truncated."""
    data = tmp_path_factory.mktemp("broken") / "easy_vqa"
    shutil.copytree(easy_vqa_folder, data)
    os.environ["DYNLLAVA_EASY_VQA"] = str(data)
    try:
        image = Path(easy_vqa.load_rows("easy_vqa_scenes")[1]["image"])
    finally:
        del os.environ["DYNLLAVA_EASY_VQA"]
    image.write_bytes(image.read_bytes()[:300])
    return data


def test_lmms_eval_fails_where_a_task_fails(tmp_path: Path, broken_data: Path) -> None:
    command = ["--model", "dynllava", "--model_args", "pretrained=tiny,mode=full"]
    command += ["--tasks", "easy_vqa_scenes", "--limit", "3"]
    done = run_command(commands.LMMS_EVAL, command, tmp_path, DYNLLAVA_EASY_VQA=str(broken_data))
    assert done.code == 2, done.text[-3000:]
    assert "easy_vqa_scenes_" in done.error() and ".png is truncated or corrupt" in done.error()
    assert not list(tmp_path.rglob("*_results.json"))


def test_vlmevalkit_fails_where_a_dataset_fails(tmp_path: Path, broken_data: Path) -> None:
    command = ["--model", "dynllava", "--pretrained", "tiny", "--mode", "full"]
    command += ["--data", "EasyVQA_Scenes", "EasyVQA", "--limit", "3", "--work-dir", "out"]
    done = run_command(commands.VLMEVALKIT, command, tmp_path, DYNLLAVA_EASY_VQA=str(broken_data))
    assert done.code == 1, done.text[-3000:]
    assert done.error().startswith("error: EasyVQA_Scenes: ") and "truncated or corrupt" in done.error()
    table = read_results(tmp_path)  # the other dataset's score stands
    assert list(table["benchmark"]) == ["easy_vqa", "easy_vqa_scenes"] and set(table["mode"]) == {"full"}
    assert list(table["status"]) == ["scored", "no figure"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--mode", "half"], "--mode: unknown value 'half'"),
        (["--mode", "full", "--mode", "image"], "--mode: full and image contradict each other"),
        (["--vision-keep-rate", "2"], "vision_keep_rate: 2.0 is outside (0, 1]"),
        (["--batch-size", "0"], "--batch-size 0: must be a positive integer"),
        (["--max_new_tokens", "-1"], "--max-new-tokens -1: must be a positive integer"),
        (["--limit", "0"], "--limit 0: must be a positive integer"),
    ],
)
def test_vlmevalkit_names_a_bad_flag_at_once(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynllava_plugin.evaluation.vlmevalkit.command import main

    assert main(["--model", "dynllava", "--data", "EasyVQA", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")


def test_lmms_eval_knows_our_tasks_and_helps(tmp_path: Path, easy_vqa_folder: Path) -> None:
    done = typed([LMMS_EVAL, "--help"], tmp_path, easy_vqa_folder)
    assert done.code == 0 and "tasks" in done.text


@pytest.mark.parametrize(
    ("model", "task", "problem"),
    [
        ("dynllava", "gqa,easy_vqaa", "--tasks easy_vqaa: no such task; did you mean easy_vqa or "),
        ("dynlava", "easy_vqa", "--model dynlava: no such model; did you mean dynllava or "),
    ],
)
def test_lmms_eval_names_what_is_misspelt(model: str, task: str, problem: str, tmp_path: Path) -> None:
    done = run_command(commands.LMMS_EVAL, ["--model", model, "--tasks", task], tmp_path)
    assert done.code == 2 and done.error().startswith(f"error: {problem}")
    assert "Traceback" not in done.text and not list(tmp_path.iterdir())
