"""Judged benchmarks against a judge on this machine, in both harnesses: figures where it answers, none where it doesn't."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from dynllava_plugin.evaluation.judges import (
    FAILED_IN_A_ROW,
    TRIES,
    Patience,
    llava_scores,
    mm_vet_score,
    unanswered,
)
from dynllava_plugin.evaluation.lmms_eval import judging as lmms_eval_judging
from dynllava_plugin.evaluation.patches import Patches
from dynllava_plugin.evaluation.results.footer import footer
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.vlmevalkit import judging as vlmevalkit_judging
from tests.commands import LMMS_EVAL, VLMEVALKIT, Finished, run_command
from tests.judge_server import FAILS, HANGS, NO_JSON, JudgeServer, judge_server
from tests.minis import make_minis

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


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    """Of all runs: lmms-eval's tasks and the kit keep an address that they have read."""
    with judge_server(right) as server:
        yield server


def run(harness: str, minis: Path, output: Path, judge: JudgeServer, *more: str) -> Finished:
    if harness == "lmms-eval":
        command = ["--model", "dynllava", "--model_args", "pretrained=tiny"]
        command += ["--tasks", "mmvet,llava_in_the_wild"]
        command += ["--gen_kwargs", "max_new_tokens=4", "--output_path", str(output)]
    else:
        command = ["--pretrained", "tiny", "--max-new-tokens", "4", "--data", "MMVet", "LLaVABench"]
        command += ["--data-root", str(minis / "LMUData"), "--work-dir", str(output)]
    module = LMMS_EVAL if harness == "lmms-eval" else VLMEVALKIT
    environment = {"OPENAI_API_KEY": "any", "OPENAI_API_URL": judge.url, "MODEL_VERSION": "judge-1"}
    return run_command(module, [*command, *more], minis / "datasets", **environment)


def cells(output: Path) -> dict[str, tuple[float | None, str]]:
    rows = read_results(output).to_dict("records")
    return {
        row["benchmark"]: (row["value"] if row["value"] == row["value"] else None, row["status"])
        for row in rows
    }


@pytest.mark.parametrize("harness", ["lmms-eval", "vlmevalkit"])
def test_every_judged_row_has_the_judge_s_figure(
    harness: str, minis: Path, tmp_path: Path, judge: JudgeServer
) -> None:
    # The judge is nobody's to match options, for which the kit would ask it, too.
    more = ["--data", "MMVet", "LLaVABench", "CV-Bench-2D", "--prompts", "kit"]
    if harness == "lmms-eval":
        more = ["--tasks", "mmvet,llava_in_the_wild,seedbench"]
    judge.answers(right)
    before = sorted((minis / "datasets").iterdir())
    done = run(harness, minis, tmp_path, judge, *more)
    assert done.code == 0, done.text[-3000:]
    assert sorted((minis / "datasets").iterdir()) == before  # nothing is left beside the data
    assert len(judge.asked) == sum(QUESTIONS.values())
    found = cells(tmp_path)
    assert found.pop("SEED" if harness == "lmms-eval" else "CVBench-2D")[1] == "scored"
    assert found == {"MM-Vet": (50.0, "scored"), "LLaVA-Wild": (75.0, "scored")}


@pytest.mark.parametrize("harness", ["lmms-eval", "vlmevalkit"])
def test_a_judge_without_scores_is_no_figure_and_soon_given_up(
    harness: str, minis: Path, tmp_path: Path, judge: JudgeServer
) -> None:
    said = itertools.cycle(["I like it", "7", FAILS, NO_JSON])
    started = time.monotonic()
    judge.answers(lambda question: next(said))
    done = run(harness, minis, tmp_path, judge)
    assert done.code == 1, done.text[-3000:]
    # Each harness may ask several samples at once: those begun are asked to their end.
    assert len(judge.asked) <= len(QUESTIONS) * TRIES * (FAILED_IN_A_ROW + 3)
    assert cells(tmp_path) == {
        name: (None, f"judge failed: {count} of {count}") for name, count in QUESTIONS.items()
    }
    assert done.text.count("it isn't asked again") == 2 and "judge failed: 4 of 4" in done.text
    assert time.monotonic() - started < 150


@pytest.mark.parametrize("harness", ["lmms-eval", "vlmevalkit"])
def test_one_answer_without_a_score_is_told(
    harness: str, minis: Path, tmp_path: Path, judge: JudgeServer
) -> None:
    """And in the kit the next run asks for that one."""
    refused: list[str] = []

    def mostly(question: str) -> str:
        if "Correctness" not in question:
            return right(question)
        refused.extend([question] if not refused else [])
        return "no" if question in refused else "0.5"

    judge.answers(mostly)
    done = run(harness, minis, tmp_path, judge)
    assert done.code == 1 and "MM" not in cells(tmp_path)
    assert cells(tmp_path) == {"MM-Vet": (None, "judge failed: 1 of 4"), "LLaVA-Wild": (75.0, "scored")}
    if harness == "vlmevalkit":
        judge.answers(right)
        again = run(harness, minis, tmp_path, judge, "--mode", "eval")
        assert again.code == 0, again.text[-3000:]
        assert len(judge.asked) == 1
        assert cells(tmp_path)["MM-Vet"] == (50.0, "scored")


def test_an_option_that_a_judge_does_not_name_is_not_drawn(
    minis: Path, tmp_path: Path, judge: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kit's explicit judge of multiple choice; scored again, the same is told."""
    monkeypatch.setattr("random.choice", None)
    judge.answers("I like it")
    command = [
        "--data",
        "RealWorldQA",
        "--judge",
        "judge-1",
        "--judge-base-url",
        judge.url,
        "--prompts",
        "kit",
    ]
    for more in ([], ["--mode", "eval"]):
        done = run("vlmevalkit", minis, tmp_path, judge, *command, *more)
        assert done.code == 0, done.text[-3000:]
        (told,) = re.findall(r"RealWorldQA: judge judge-1 named no option for (\d+) answers", done.text)
        assert 0 < int(told) and len(judge.asked) == 3 * int(told)
        assert f"the judge named no option for them: {told} of RealWorldQA" in footer([tmp_path])


def patience_of_client(said: str) -> float:
    """Seconds that a test can wait for, 18 times."""
    return 0.1 if said == HANGS else 10.0


@pytest.mark.parametrize("said", ["I like it", "7", "", FAILS, HANGS, NO_JSON])
def test_lmms_eval_s_client_takes_no_failure_for_a_score(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MM-Vet's and LLaVA-Bench's ways to ask."""
    from lmms_eval.llm_judge import get_server
    from lmms_eval.verifiers import VerifyResult

    monkeypatch.setattr(lmms_eval_judging, "TIMEOUT", patience_of_client(said))
    with judge_server(said) as judge:
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        monkeypatch.setenv("OPENAI_API_URL", judge.url)
        facts = {"API_TYPE": "openai", "MODEL_VERSION": "judge-1"}
        mmvet, llava = {"server": get_server("openai"), **facts}, {"VerifyResult": VerifyResult, **facts}
        lmms_eval_judging._repair_mm_vet(mmvet, Patience(judge.url))
        lmms_eval_judging._repair_llava(llava, Patience(judge.url))
        started = time.monotonic()
        assert [mmvet["get_chat_response"]("?", temperature=0.0) for _ in range(6)] == [("", "")] * 6
        verify = llava["_get_pipeline"]()
        results = [verify(question="?", prediction="a", ground_truth="b", content="?") for _ in range(6)]
        assert [result.metadata["scores"] for result in results] == [[-1.0, -1.0]] * 6
        assert time.monotonic() - started < 30 and len(judge.asked) == 2 * TRIES * FAILED_IN_A_ROW
    assert unanswered({"mmvet": [{"gpt_eval_score": {"score": 0.0, "eval_model": ""}}]}) == {"mmvet": 1}


@pytest.mark.parametrize("said", ["I like it", "7", "", FAILS, HANGS, NO_JSON])
def test_the_kit_s_client_takes_no_failure_for_a_score(said: str) -> None:
    from vlmeval.api import OpenAIWrapper
    from vlmeval.dataset.utils import mmvet

    with judge_server(said) as judge, Patches() as patches:
        vlmevalkit_judging.repair_judged(patches, judge.url)
        from vlmeval.dataset.utils import llavabench

        client = OpenAIWrapper(
            "judge-1", key="any", api_base=f"{judge.url}/chat/completions", retry=1, wait=0,
            timeout=patience_of_client(said),
        )  # fmt: skip
        line = {"question": "?", "answer": "a", "prediction": "b"}
        assert [mmvet.MMVet_auxeval(client, line)["score"] for _ in range(6)] == [-1.0] * 6
        assert [llavabench.LLaVABench_atomeval(client, "?") for _ in range(6)] == [[-1.0, -1.0]] * 6
        assert len(judge.asked) == 2 * TRIES * FAILED_IN_A_ROW


def test_mm_vet_s_means_are_the_kit_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every capability has rows the kit itself can say them."""
    from vlmeval.dataset.utils import mmvet

    data = pd.DataFrame(
        {
            "category": ["rec,ocr", "know,gen", "spat,math", "rec,gen", "rec,ocr"],
            "score": [0.1, 0.2, 1.0, 0.4, 0.0],
        }
    )
    monkeypatch.setattr(mmvet, "load", lambda path: data)
    theirs = [json.loads(table.to_json()) for table in mmvet.MMVet_acc("any.xlsx")]
    for ours, other in zip(vlmevalkit_judging.mm_vet_figures(data), theirs, strict=True):
        assert json.loads(ours.to_json())["Category"] == other["Category"]
        assert list(ours["acc"]) == pytest.approx(list(other["acc"].values()))
        assert list(ours["tot"]) == list(other["tot"].values())
