"""The smoke check's second computation: equal to the harnesses' own scorers for any predictions."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import load_dataset
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.minis import MARKER, make_minis
from tests.minis.__main__ import main
from tests.property_tests import examples
from tests.smoke.check import check_table, read_truth
from tests.smoke.expected import EXPECTED

FEW = examples(15, suppress_health_check=list(HealthCheck))
WORDS = [
    "yes",
    "no",
    "circle",
    "a circle",
    "red",
    "the red shape",
    "Yes.",
    "no thing",
    "blue thing",
    "triangle",
]
LETTERS = ["A", "B", "C", "D", "A.", "B. no", "(C)", "A circle", "b"]


@pytest.fixture(scope="session")
def minis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minis") / "mini"
    make_minis(folder)
    return folder


E = "lmms-lab-encoder/"
# Repository, configuration, split; the task's module, what processes a result, its key, what aggregates (None: mean).
LMMS_EVAL = {
    "VQAv2": (f"{E}VQAv2", None, "validation", "vqav2", "vqav2_process_results_val", "exact_match", None),
    "VizWiz": (f"{E}VizWiz-VQA", None, "val", "vizwiz_vqa", "vizwiz_vqa_process_results", "exact_match", None),
    "TextVQA": (f"{E}textvqa", None, "validation", "textvqa", "textvqa_process_results", "exact_match", None),
    "SciQA": (f"{E}ScienceQA", "ScienceQA-IMG", "test", "scienceqa", "sqa_process_results", "exact_match", None),
    "RealWorldQA": (f"{E}RealWorldQA", None, "test", "realworldqa", "realworldqa_process_results", "exact_match", None),
    "POPE": (f"{E}POPE", None, "test", "pope", "pope_process_results", "pope_f1_score", "pope_aggregate_f1_score"),
    "MME": (f"{E}MME", None, "test", "mme", "mme_process_results", "mme_perception_score", "mme_aggregate_results"),
    "MMBench": (f"{E}MMBench", "en", "dev", "mmbench", "", "", None),
    "SEED": (f"{E}SEED-Bench", None, "test", "seedbench", "seed_process_result", "seed_image", "seed_aggregation_result"),
    "MMVP": (
        "lmms-lab-eval/MMVP", None, "train", "mmvp", "mmvp_process_results", "mmvp_pair_accuracy",
        "mmvp_aggregate_pair_results",
    ),
    "CVBench-2D": (
        "nyu-visionx/CV-Bench", "2D", "test", "cv_bench", "cv_bench_process_results", "cv_bench_acc",
        "cv_bench_aggregate_results",
    ),
    "DocVQA": (f"{E}DocVQA", "DocVQA", "validation", "docvqa", "", "", None),
    "InfoVQA": (f"{E}DocVQA", "InfographicVQA", "validation", "infovqa", "", "", None),
    "ChartQA": (f"{E}ChartQA", None, "test", "chartqa", "chartqa_process_results", "relaxed_overall", None),
    "OCRBench": ("echo840/OCRBench", None, "test", "ocrbench", "ocrbench_process_results", "ocrbench_accuracy", None),
    "AI2D": (f"{E}ai2d", None, "test", "ai2d", "", "", None),
    "MMStar": ("Lin-Chen/MMStar", None, "val", "mmstar", "mmstar_process_results", "average", "mmstar_aggregate_results"),
    "MMMU": (f"{E}MMMU", None, "validation", "mmmu", "mmmu_process_results", "mmmu_acc", "mmmu_aggregate_results"),
    "MMBench-CN": (f"{E}MMBench", "cn", "dev", "mmbench", "", "", None),
}  # fmt: skip


def lmms_eval_score(name: str, docs: list[dict[str, Any]], said: Sequence[str]) -> float:
    """By the task's own functions, in percent (MME: points)."""
    module, process, key, aggregate = LMMS_EVAL[name][3:]
    if name.startswith("MMBench"):
        utils = importlib.import_module("lmms_eval.tasks.mmbench.en_utils")
        found = [utils.mmbench_process_results(dict(d), [text]) for d, text in zip(docs, said, strict=True)]
        return (
            100 * utils.mmbench_evaluator.eval_result([item["gpt_eval_score"] for item in found], "static")[0]
        )
    metrics = importlib.import_module("lmms_eval.api.metrics")
    if name in ("DocVQA", "InfoVQA"):
        found = [metrics.anls(d["answers"], [text])["anls"] for d, text in zip(docs, said, strict=True)]
        return 100 * float(np.mean(found))
    utils = importlib.import_module(f"lmms_eval.tasks.{module}.utils")
    if name == "AI2D":
        read = utils.MultiChoiceRegexFilter().apply([[text] for text in said], docs)
        wanted = [utils.ai2d_doc_to_target(d, "mcq") for d in docs]
        return (
            100
            * metrics.exact_match_hf_evaluate(read, wanted, ignore_case=True, ignore_punctuation=True)[
                "exact_match"
            ]
        )
    results = [getattr(utils, process)(copy.deepcopy(d), [text]) for d, text in zip(docs, said, strict=True)]
    values = [item[key] for item in results if key in item]
    if name == "OCRBench":  # of 1,000
        return sum(item["score"] for item in values) / 10
    if aggregate is None:
        return 100 * float(np.mean(values))
    return (1 if name == "MME" else 100) * getattr(utils, aggregate)(values)


@pytest.mark.parametrize("name", list(LMMS_EVAL))
def test_lmms_eval_scores_as_expected(name: str, minis: Path) -> None:
    repo, config, split = LMMS_EVAL[name][:3]
    docs = list(load_dataset(str(minis / "datasets" / repo), config, split=split))
    truth = read_truth(minis, name)
    right = [row.get("letter", row["answer"]) for row in truth] + ["A"] * (len(docs) - len(truth))
    answers = st.sampled_from([*WORDS, *LETTERS])
    values = set()

    @FEW
    @given(said=st.tuples(*(st.one_of(st.just(own), st.just(own), answers) for own in right)))
    def compare(said: tuple[str, ...]) -> None:
        wanted = EXPECTED[name, "lmms-eval"](dict(enumerate(said)), truth)
        score = lmms_eval_score(name, docs, said)
        low, high = wanted if isinstance(wanted, tuple) else (wanted - 1e-6, wanted + 1e-6)
        assert low <= score <= high, said
        values.add(round(score, 3))

    compare()
    assert len(values) > 1  # several scores, not always the same one


def kit_mcq(rows: pd.DataFrame, said: list[str], circular: bool) -> list[bool]:
    utils = importlib.import_module("vlmeval.dataset.utils.multiple_choice")
    found = []
    for (_, row), text in zip(rows.iterrows(), said, strict=True):
        item = {**row.to_dict(), "prediction": text, "GT": row["answer"]}
        found.append(bool(utils.eval_vanilla(None, item)["hit"]))
    if not circular:
        return found
    groups: dict[int, list[bool]] = {}
    for index, hit in zip(rows["index"], found, strict=True):
        groups.setdefault(int(index) % 1_000_000, []).append(hit)
    return [all(hits) for hits in groups.values()]


def kit_score(name: str, data: pd.DataFrame, said: list[str]) -> float:
    """By the kit's own matching functions and ratings."""
    if name in KIT_VQA:
        utils = importlib.import_module("vlmeval.dataset.utils.vqa_eval")
        column = "answers" if name == "VizWiz" else "answer"
        method, kind = KIT_VQA[name]
        results = [
            utils.process_line({"answer": row[column], "prediction": text}, method=method)
            for (_, row), text in zip(data.iterrows(), said, strict=True)
        ]
        return 100 * float(np.mean(utils.hit_calculate(results, kind)))
    if name == "OCRBench":
        path = f"{KIT_FILES}/{name}.tsv"
        data.drop(columns="image").assign(prediction=said).to_csv(path, sep="\t", index=False)
        return importlib.import_module("vlmeval.dataset.image_vqa").OCRBench.evaluate(path)[
            "Final Score Norm"
        ]
    if name in ("POPE", "MME", "AMBER"):
        utils = importlib.import_module("vlmeval.dataset.utils.yorn")
        frame = data.drop(columns="image").assign(extracted=[utils.YOrN_Extraction(text) for text in said])
        frame["score"] = frame["answer"].str.capitalize() == frame["extracted"]
        path = f"{KIT_FILES}/{name}.tsv"
        frame.to_csv(path, sep="\t", index=False)
        rated = getattr(utils, f"{name}_rating")(path)
        return float(rated[{"POPE": "Overall", "MME": "perception", "AMBER": "Avg ACC"}[name]][0])
    if name == "MMMU":
        data = importlib.import_module("vlmeval.dataset.utils.multiple_choice").MMMU_preproc(data)
        data["answer"] = [text if text in "ABCD" else "A" for text in data["answer"]]
    hits = kit_mcq(data, said, circular=name.startswith("MMBench"))
    if name == "MMMU":
        return 100 * float(
            np.mean([hit for hit, split in zip(hits, data["split"], strict=True) if split == "validation"])
        )
    if name == "MMVP":
        return 100 * float(np.mean([a and b for a, b in zip(hits[::2], hits[1::2], strict=True)]))
    if name == "CVBench-2D":
        sources = data.assign(hit=hits).groupby("source")["hit"].mean()
        return 100 * float(sources.mean())
    return 100 * float(np.mean(hits))


KIT = {
    "GQA": "GQA_TestDev_Balanced", "TextVQA": "TextVQA_VAL", "VizWiz": "VizWiz", "SciQA": "ScienceQA_TEST",
    "SEED": "SEEDBench_IMG", "RealWorldQA": "RealWorldQA", "MMBench": "MMBench_DEV_EN", "MMVP": "MMVP",
    "CVBench-2D": "CV-Bench-2D", "POPE": "POPE", "MME": "MME", "DocVQA": "DocVQA_VAL", "InfoVQA": "InfoVQA_VAL",
    "ChartQA": "ChartQA_TEST", "OCRBench": "OCRBench", "AI2D": "AI2D_TEST", "MMStar": "MMStar", "MMMU": "MMMU_DEV_VAL",
    "MMBench-CN": "MMBench_DEV_CN", "AMBER": "AMBER",
}  # fmt: skip
KIT_VQA = {  # how a line is scored, and as which dataset's lines they are counted
    "VizWiz": ("vqa_score", "TextVQA"), "TextVQA": ("vqa_score", "TextVQA"), "GQA": ("accuracy", "TextVQA"),
    "DocVQA": ("anls", "DocVQA"), "InfoVQA": ("anls", "InfoVQA"), "ChartQA": ("relaxed_accuracy", "ChartQA"),
}  # fmt: skip
KIT_FILES = ""


@pytest.mark.parametrize("name", list(KIT))
def test_vlmevalkit_scores_as_expected(name: str, minis: Path, tmp_path: Path) -> None:
    global KIT_FILES
    KIT_FILES = str(tmp_path)
    data, truth = pd.read_csv(minis / "LMUData" / f"{KIT[name]}.tsv", sep="\t"), read_truth(minis, name)
    right = [str(value) for value in data["answer"]] if "answer" in data else [row["answer"] for row in truth]
    if name in KIT_VQA or name == "OCRBench":
        right = [row["answer"] for row in truth]
    answers = st.sampled_from([*WORDS, *LETTERS])
    values = set()

    @FEW
    @given(said=st.tuples(*(st.one_of(st.just(own), st.just(own), st.just(own), answers) for own in right)))
    def compare(said: tuple[str, ...]) -> None:
        wanted = EXPECTED[name, "vlmevalkit"](dict(enumerate(said)), truth)
        assert kit_score(name, data, list(said)) == pytest.approx(wanted, abs=1e-6), said
        values.add(round(wanted, 3))

    compare()
    assert len(values) > 1


def test_same_miniatures_every_time(minis: Path, tmp_path: Path) -> None:
    make_minis(tmp_path / "again")
    for path in sorted((minis / "truth").iterdir()):
        assert path.read_text() == (tmp_path / "again" / "truth" / path.name).read_text()
    for name in ("MMBench_DEV_EN", "CV-Bench-2D"):
        first, second = (root / "LMUData" / f"{name}.tsv" for root in (minis, tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()


def test_minis_hold_all_kinds_of_answers(minis: Path) -> None:
    """No score of a miniature is right by always saying the same."""
    for path in (minis / "truth").glob("*.jsonl"):
        truth = read_truth(minis, path.stem)
        said = {row.get("letter", row["answer"]) for row in truth}
        assert len(said) > 1 or len(truth) < 4, path.stem
        assert [row["number"] for row in truth] == list(range(len(truth)))


def cell(**changes: Any) -> Mapping[str, Any]:
    base = {
        "benchmark": "MM-Vet",
        "harness": "lmms-eval",
        "metric": "score",
        "value": np.nan,
        "status": "needs judge",
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (cell(value=31.0, status="scored"), "a score without a judge"),
        (cell(benchmark="POPE", metric="f1", status="scored"), "no number"),
        (cell(benchmark="GQA"), "no cell"),
    ],
)
def test_a_wrong_cell_is_named(row: Mapping[str, Any], problem: str, minis: Path, tmp_path: Path) -> None:
    from dynllava_plugin.evaluation.benchmarks import find_benchmark
    from dynllava_plugin.evaluation.suite.runs import Run

    name = "POPE" if problem in ("no number", "no cell") else "MM-Vet"
    run = Run(find_benchmark(name), "lmms-eval", "", tmp_path, [], {}, tmp_path, {}, {})
    (found,) = check_table(pd.DataFrame([row]), [run], minis, None)
    assert found.startswith(f"{name} in lmms-eval") and problem in found


def test_the_command_replaces_its_own_folder_and_no_other(
    minis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.minis._write", lambda folder: (folder.mkdir(), (folder / MARKER).touch()))
    mine, foreign = tmp_path / "mine", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    assert [main([str(mine)]), main([str(mine)]), main([str(foreign)])] == [0, 0, 2]
    assert "not made by tests.minis" in capsys.readouterr().err and (foreign / "thesis.tex").exists()
