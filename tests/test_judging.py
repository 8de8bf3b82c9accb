"""Judged benchmarks against a judge on this machine, in both harnesses: figures where it answers, none where it doesn't."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynllava_plugin.evaluation.judges import unanswered
from dynllava_plugin.evaluation.judging import FAILED_IN_A_ROW, TRIES, Patience, llava_scores, mm_vet_score
from dynllava_plugin.evaluation.minis.command import make_minis
from dynllava_plugin.evaluation.results import read_results
from tests.judge_server import FAILS, HANGS, NO_JSON, judge_server

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = {"MM-Vet": 4, "LLaVA-Wild": 6}


def right(question: str) -> str:
    """MM-Vet's one number, LLaVA-Bench's two and why."""
    return "0.5" if "Correctness" in question else "8 6\nThe second says less."


@pytest.mark.parametrize(
    ("text", "score"),
    [
        *(("0.5", 0.5), ("1.0", 1.0), ("0", 0.0), ("0.7 because", 0.7), (" 0.3\n", 0.3), ("1.", 1.0)),
        *((text, None) for text in ("", None, "good", "7", "-1", "nan", "inf", "0.5/1", "Score: 0.5")),
    ],
)
def test_what_is_a_score_of_mm_vet(text: str | None, score: float | None) -> None:
    assert mm_vet_score(text) == score


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        *(("8 6\nwhy", (8, 6)), ("8, 6", (8, 6)), ("10 0", (10, 0)), (" 7.5 9 ", (7.5, 9))),
        *(
            (text, None)
            for text in ("", None, "8", "8 6 7", "0 5", "11 5", "8 -1", "eight six", "nan nan", "busy")
        ),
    ],
)
def test_what_are_scores_of_llava_bench(text: str | None, scores: tuple[float, float] | None) -> None:
    assert llava_scores(text) == scores


def test_a_judge_is_given_up_once_it_failed_some_samples_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    patience, asked = Patience("http://host/v1"), []

    def fails(attempt: int) -> None:
        asked.append(attempt)
        raise OSError("out of order\nmore")

    assert [patience.ask(fails), patience.ask(fails), patience.ask(lambda attempt: 1)] == [None, None, 1]
    assert [patience.ask(fails) for _ in range(10)] == [None] * 10 and patience.is_over
    assert len(asked) == (2 + FAILED_IN_A_ROW) * TRIES
    assert patience.ask(lambda attempt: 1) is None  # it isn't asked
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "http://host/v1: no score for 3 samples in a row (out of order)" in lines[0]


@pytest.fixture(scope="module")
def minis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minis") / "mini"
    make_minis(folder)
    return folder


def run(harness: str, minis: Path, output: Path, url: str, *more: str) -> subprocess.CompletedProcess[str]:
    if harness == "lmms-eval":
        command = ["-m", "dynllava_plugin.evaluation.lmms_eval_command", "--model", "dynllava"]
        command += ["--model_args", "pretrained=tiny", "--tasks", "mmvet,llava_in_the_wild"]
        command += ["--gen_kwargs", "max_new_tokens=4", "--output_path", str(output)]
    else:
        command = [str(ROOT / "run_vlmevalkit.py"), "--pretrained", "tiny", "--max-new-tokens", "4"]
        command += ["--data", "MMVet", "LLaVABench", "--data-root", str(minis / "LMUData")]
        command += ["--work-dir", str(output)]
    judge = {"OPENAI_API_KEY": "any", "OPENAI_API_URL": url, "MODEL_VERSION": "judge-1"}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command, *more],
        cwd=minis / "datasets",
        env={**os.environ, **judge, **offline},
        capture_output=True,
        text=True,
        timeout=900,
    )


def cells(output: Path) -> dict[str, tuple[float | None, str]]:
    rows = read_results(output).to_dict("records")
    return {
        row["benchmark"]: (row["value"] if row["value"] == row["value"] else None, row["status"])
        for row in rows
    }


@pytest.mark.parametrize("harness", ["lmms-eval", "vlmevalkit"])
def test_every_judged_row_has_the_judge_s_figure(harness: str, minis: Path, tmp_path: Path) -> None:
    with judge_server(right) as judge:
        done = run(harness, minis, tmp_path, judge.url)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(judge.asked) == sum(QUESTIONS.values())
    assert cells(tmp_path) == {"MM-Vet": (50.0, "scored"), "LLaVA-Wild": (75.0, "scored")}


@pytest.mark.parametrize("said", ["I like it", "7", FAILS, NO_JSON])
@pytest.mark.parametrize("harness", ["lmms-eval", "vlmevalkit"])
def test_a_judge_without_scores_is_no_figure_and_soon_given_up(
    harness: str, said: str, minis: Path, tmp_path: Path
) -> None:
    started = time.monotonic()
    with judge_server(said) as judge:
        done = run(harness, minis, tmp_path, judge.url)
    assert done.returncode == 1, done.stderr[-3000:]
    # The kit asks four samples at once, lmms-eval may: those begun are asked to their end.
    assert len(judge.asked) <= len(QUESTIONS) * TRIES * (FAILED_IN_A_ROW + 3)
    assert cells(tmp_path) == {
        name: (None, f"judge failed: {count} of {count}") for name, count in QUESTIONS.items()
    }
    assert done.stderr.count("it isn't asked again") == 2 and "judge failed: 4 of 4" in done.stderr
    assert time.monotonic() - started < 150


@pytest.mark.parametrize("harness", ["lmms-eval", "vlmevalkit"])
def test_one_answer_without_a_score_is_told(harness: str, minis: Path, tmp_path: Path) -> None:
    """And in the kit the next run asks for that one."""
    refused: list[str] = []

    def mostly(question: str) -> str:
        if "Correctness" not in question:
            return right(question)
        refused.extend([question] if not refused else [])
        return "no" if question in refused else "0.5"

    with judge_server(mostly) as judge:
        done = run(harness, minis, tmp_path, judge.url)
        assert done.returncode == 1 and "MM" not in cells(tmp_path)
        assert cells(tmp_path) == {"MM-Vet": (None, "judge failed: 1 of 4"), "LLaVA-Wild": (75.0, "scored")}
        if harness == "vlmevalkit":
            refused[:] = [""]
            before = len(judge.asked)
            again = run(harness, minis, tmp_path, judge.url, "--mode", "eval")
            assert again.returncode == 0, again.stderr[-3000:]
            assert len(judge.asked) == before + 1
            assert cells(tmp_path)["MM-Vet"] == (50.0, "scored")


def test_a_judge_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval's client, with a time that a test can wait for."""
    from dynllava_plugin.evaluation import lmms_eval_judging

    monkeypatch.setattr(lmms_eval_judging, "TIMEOUT", 0.5)
    with judge_server(HANGS) as judge:
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        monkeypatch.setenv("OPENAI_API_URL", judge.url)
        from lmms_eval.llm_judge import get_server

        module = {"server": get_server("openai"), "MODEL_VERSION": "judge-1"}
        lmms_eval_judging._repair_mm_vet(module, Patience(judge.url))
        started = time.monotonic()
        assert [module["get_chat_response"]("?", temperature=0.0) for _ in range(6)] == [("", "")] * 6
        assert time.monotonic() - started < 20 and len(judge.asked) == TRIES * FAILED_IN_A_ROW
    assert unanswered({"mmvet": [{"gpt_eval_score": {"score": 0.0, "eval_model": ""}}]}) == {"mmvet": 1}
