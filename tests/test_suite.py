"""`dynllava eval`: settings, folders, resuming, failures, progress, journal and judge, without a harness."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation import judges
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS, find_benchmark
from dynllava_plugin.evaluation.engine.answers import Answer, Score
from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.results.footer import footer
from dynllava_plugin.evaluation.results.journal import Journal, entry_key
from dynllava_plugin.evaluation.suite import data as suite_data
from dynllava_plugin.evaluation.suite import runner
from dynllava_plugin.evaluation.suite.config import SuiteConfig
from dynllava_plugin.evaluation.suite.progress import Progress, clock
from dynllava_plugin.evaluation.suite.runner import Outcome, Runner, read_state
from dynllava_plugin.evaluation.suite.runs import Run, plan
from dynllava_plugin.flops import OutputCost

ROOT = Path(__file__).resolve().parents[1]


def suite(tmp_path: Path, text: str = "benchmarks: [GQA, easy_vqa]\n") -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def config(tmp_path: Path, **overrides: Any) -> SuiteConfig:
    values = {"pretrained": "tiny", "output": str(tmp_path / "out"), **overrides}
    return SuiteConfig.read(suite(tmp_path), values)


@pytest.mark.parametrize("path", sorted((ROOT / "eval_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_suites_are_valid(path: Path, tmp_path: Path) -> None:
    if path.stem == "lmms_eval_easy_vqa":
        with pytest.raises(UserError, match=f"use lmms_eval --config {path}$"):
            SuiteConfig.read(path, {"pretrained": "tiny"})
        return
    runs = plan(SuiteConfig.read(path, {"pretrained": "tiny", "output": str(tmp_path)}), None)
    assert len(runs) >= 3 and len({run.folder for run in runs}) == len(runs)


def test_smoke_suite_has_every_benchmark_whose_data_is_not_at_hand() -> None:
    wanted = SuiteConfig.read(ROOT / "eval_configs" / "smoke.yaml", {"pretrained": "tiny"}).wanted()
    assert {item.name for item in wanted} == {item.name for item in BENCHMARKS} - set(easy_vqa.BENCHMARKS)


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        ("benchmarks: [GQB]", [], "GQB: no such benchmark; did you mean GQA"),
        ("benchmarks: []", [], "`benchmarks` is empty"),
        ("tasks: gqa", [], "my.yaml: not a suite but lmms-eval's; use lmms_eval --config "),
        ("model: dynllava", [], "use lmms_eval --config "),
        ("benchmark: GQA", [], "unknown key 'benchmark'; known are"),
        ("5: GQA", [], "unknown key '5'; known are"),
        ("- GQA", [], "expected keys like"),
        ("benchmarks: [", [], "not YAML"),
        ("benchmarks:", [], "`benchmarks` is empty"),
        ("benchmarks: 5", [], "`benchmarks` has to be a name or a list of names, not 5"),
        ("benchmarks: {GQA: 1}", [], "`benchmarks` has to be a name or a list of names"),
        ("benchmarks: GQA\nmode: [[full]]", [], "`mode` has to be a name or a list of names"),
        ("benchmarks: GQA\nharness: [both]", [], "`harness` has to be text"),
        ("benchmarks: GQA\nvision_keep_rate: some", [], "`vision_keep_rate` has to be a number"),
        ("benchmarks: GQA\nlimit: true", [], "--limit True: must be a positive integer"),
        ("benchmarks: GQA\nlimit: many", [], "--limit many: must be a positive integer"),
        ("benchmarks: GQA\nharness: mine", [], "--harness: unknown value 'mine'"),
        ("benchmarks: GQA", ["--limit", "0"], "--limit 0: must be a positive integer"),
        ("benchmarks: GQA", ["--vision-keep-rate", "2"], "vision_keep_rate: 2.0 is outside"),
        ("benchmarks: GQA", ["--pretrained", "a,b"], "--pretrained a,b: lmms-eval can't take"),
        ("benchmarks: GQA", ["--data", "nowhere"], "--data nowhere: no such folder"),
        (
            "benchmarks: [VQAv2-test, TextVQA-test]",
            ["--harness", "vlmevalkit"],
            "--harness vlmevalkit: has no task for VQAv2-test, TextVQA-test",
        ),
        ("benchmarks: GQA", ["--dtype", "f16"], "dtype: 'f16' is not one of float32"),
        ("benchmarks: GQA", ["--device", "cudda"], "device: 'cudda' is not a device"),
        ("benchmarks: GQA", ["--device", "cuda:99"], "device: 'cuda:99' asked for, but"),
        ("benchmarks: GQA", ["--policy", "fastv,k=50"], "fastv: layer 50 is outside the model"),
        ("benchmarks: GQA", ["--attn-implementation", "flashy"], "attn_implementation: "),
    ],
)
def test_bad_settings_are_one_line(
    text: str, flags: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags if "--pretrained" in flags else [*flags, "--pretrained", "tiny"]
    assert main(["eval", str(suite(tmp_path, text)), *flags]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.startswith("error: ") and error.count("\n") == 1


class NoRuns:
    """A runner that runs nothing."""

    def __init__(self, runs: list[Run], *settings: Any) -> None:
        self.runs = runs

    def run(self) -> list[Any]:
        raise KeyboardInterrupt


def test_what_no_harness_has_is_left_out_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "Runner", NoRuns)
    path = suite(tmp_path, "benchmarks: [GQA, VQAv2-test, TextVQA-test]")
    flags = ["--pretrained", "tiny", "--output", str(tmp_path / "out")]
    assert main(["eval", str(path), *flags, "--harness", "vlmevalkit"]) == 130
    said = capsys.readouterr()
    assert said.out.startswith("1 run into ")
    assert said.err.splitlines()[0] == "left out, vlmevalkit has no task for them: VQAv2-test, TextVQA-test"
    assert main(["eval", str(path), *flags]) == 130
    said = capsys.readouterr()
    assert said.out.startswith("4 runs into ") and "left out" not in said.err


def test_the_footer_counts_runs(tmp_path: Path) -> None:
    (tmp_path / "dynllava_run.json").write_text('{"seconds": 3}')
    assert footer([tmp_path]) == "\nTime: answering 3 s in 1 run  \n"
    (tmp_path / "other_dynllava_run.json").write_text('{"seconds": 3}')
    assert footer([tmp_path]) == "\nTime: answering 6 s in 2 runs  \n"


def test_a_suite_may_name_its_judge(tmp_path: Path) -> None:
    chosen = SuiteConfig.read(
        suite(tmp_path, "benchmarks: GQA\njudge_url: http://host/v1\njudge_model: some"),
        {"pretrained": "tiny"},
    )
    assert (chosen.judge_url, chosen.judge_model) == ("http://host/v1", "some")


def test_no_checkpoint_and_no_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(suite(tmp_path))]) == 2
    assert "--pretrained: name a checkpoint" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "none.yaml"), "--pretrained", "tiny"]) == 2
    assert "none.yaml: can't be read" in capsys.readouterr().err


def test_a_packaged_suite_is_found_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = SuiteConfig.read(Path("understanding"), {"pretrained": "tiny"})
    assert by_name == SuiteConfig.read(ROOT / "eval_configs" / "understanding.yaml", {"pretrained": "tiny"})
    assert by_name.output == Path("results/understanding")
    assert main(["eval", "understandign", "--pretrained", "tiny"]) == 2
    known = "easy_vqa, easy_vqa_hard, generation, modern, smoke, submissions, understanding, or name a file"
    assert f"understandign: no such suite; packaged are {known}" in capsys.readouterr().err
    assert main(["eval", "eval_configs/smoke.yaml", "--pretrained", "tiny"]) == 2
    assert "no such file; the packaged suite is `dynllava eval smoke`" in capsys.readouterr().err
    (tmp_path / "smoke.yaml").write_text("benchmarks: GQA")  # the user's own file goes first
    assert SuiteConfig.read(Path("smoke.yaml"), {"pretrained": "tiny"}).benchmarks == ("GQA",)


def test_how_a_model_is_asked_reaches_both_harnesses(tmp_path: Path) -> None:
    lmms, kit = plan(config(tmp_path, system_prompt="Be brief.", max_pixels=50176), None)[:2]
    assert any("system_prompt=Be brief.,max_pixels=50176" in word for word in lmms.command)
    flags = kit.command[kit.command.index("--system-prompt") :][:4]
    assert flags == ["--system-prompt", "Be brief.", "--max-pixels", "50176"]
    with pytest.raises(UserError, match="--system-prompt: lmms-eval can't take one with"):
        config(tmp_path, system_prompt="Be brief, please.")
    with pytest.raises(UserError, match="--max-pixels 0: must be a positive integer"):
        config(tmp_path, max_pixels=0)


def test_each_checkpoint_and_setting_has_its_own_folder(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"one")
    variants = [
        {},
        {"mode": "full"},
        {"mode": "image", "vision_keep_rate": 0.1},
        {"limit": 5},
        {"dtype": "bfloat16"},
        {"prompts": "kit"},
        {"system_prompt": "Be brief."},
        {"max_pixels": 50176},
        {"pretrained": str(model)},
    ]
    roots = [plan(config(tmp_path, **variant), None)[0].folder.parents[1] for variant in variants]
    (model / "model.safetensors").write_bytes(b"two")  # the same size and, perhaps, the same time
    from dynllava_plugin.evaluation.results.identity import checkpoint_hash

    checkpoint_hash.cache_clear()
    roots.append(plan(config(tmp_path, pretrained=str(model)), None)[0].folder.parents[1])
    assert len(set(roots)) == len(roots)
    same = [{}, {"batch_size": 3}, {"num_processes": 2}, {"jobs": 2}]
    assert len({plan(config(tmp_path, **variant), None)[0].folder for variant in same}) == 1


def test_a_mode_named_twice_is_run_once(tmp_path: Path) -> None:
    """Two runs of one folder would write over each other."""
    assert len(plan(config(tmp_path, mode=["image", "full", "image"]), None)) == len(
        plan(config(tmp_path, mode=["image", "full"]), None)
    )


def test_commands_are_the_harnesses_own(tmp_path: Path) -> None:
    (tmp_path / "data" / "LMUData").mkdir(parents=True)
    (tmp_path / "data" / "datasets").mkdir()
    chosen = config(tmp_path, mode=["image"], limit=7, data=str(tmp_path / "data"), num_processes=2)
    lmms, kit = plan(chosen, None)[:2]
    assert (
        "torch.distributed.run" in lmms.launch
        and lmms.command[0] == "dynllava_plugin.evaluation.lmms_eval.command"
    )
    text = " ".join(lmms.command)
    assert "--model_args pretrained=tiny,mode=image --log_samples --tasks gqa --batch_size 8" in text
    assert text.endswith("--limit 7") and lmms.directory == tmp_path / "data" / "datasets"
    text = " ".join(kit.command)
    assert "--data GQA_TestDev_Balanced" in text and f"--data-root {tmp_path / 'data' / 'LMUData'}" in text
    assert "--mode image" in text and kit.journal == kit.root / "vlmevalkit" / "GQA" / "journal"


def fake(tmp_path: Path, name: str, code: str, **changes: Any) -> Run:
    """A run that is a line of Python; its folder is where a real one's would be, and so is its result's."""
    folder = tmp_path / "out" / "setting" / "lmms-eval" / name
    code = f"__import__('os').makedirs({str(folder / 'output')!r}, exist_ok=True); {code}"
    path = {"PYTHONPATH": str(ROOT)}
    made = Run(
        find_benchmark("easy_vqa"), "lmms-eval", name, folder, ["tests.fake_harness", code], path, tmp_path,
        {"data": 1}, {"judge": None},
    )  # fmt: skip
    return replace(made, **changes)


def run_all(runs: list[Run], jobs: int = 1) -> tuple[dict[str, str], list[str]]:
    lines: list[str] = []
    outcomes = Runner(runs, jobs, None, lines.append).run()
    assert [outcome.run for outcome in outcomes] == runs
    return {outcome.run.mode: outcome.problem for outcome in outcomes}, lines


def test_a_failing_benchmark_stops_no_other(tmp_path: Path) -> None:
    runs = [
        fake(tmp_path, "good", "print('fine')"),
        fake(tmp_path, "bad", "import sys; print('error: no such thing'); print('later'); sys.exit(3)"),
        fake(
            tmp_path, "full", "import sys; print('OSError: [Errno 28] No space left on device'); sys.exit(1)"
        ),
        fake(tmp_path, "also good", "pass"),
    ]
    problems, lines = run_all(runs, jobs=2)
    assert problems["good"] == problems["also good"] == ""
    assert problems["bad"].startswith("ended with 3 (no such thing; see ") and "log.txt" in problems["bad"]
    assert "no space left on the disk" in problems["full"]
    assert len(lines) == 4 and sum("FAILED" in line for line in lines) == 2 and lines[0].startswith("[1/4]")
    assert "later" not in problems["also good"]
    assert "; about " in lines[2] and "; about " not in lines[3]
    assert read_state(runs[0].folder)["state"] == "done" and read_state(runs[1].folder)["state"] == "failed"


def test_one_process_carries_out_a_settings_runs_of_a_harness(tmp_path: Path) -> None:
    """Each has its journal and log, and the process is the same; the model would be too."""
    note = "journal.parent.joinpath('note').write_text(f'{pid} {journal.parent.name} {id(load)}'); print(journal)"
    names = ("a", "b", "c", "d")
    runs = [fake(tmp_path, name, note) for name in names]
    other = fake(tmp_path, "e", note, harness="vlmevalkit", folder=runs[0].root / "vlmevalkit" / "e")
    runner_of_all = Runner([*runs, other], 2, None, lambda line: None)
    assert not any(outcome.problem for outcome in runner_of_all.run()) and runner_of_all.processes == 2
    notes = [run.folder.joinpath("note").read_text().split() for run in runs]
    assert len({(pid, model) for pid, _, model in notes}) == 1 and [name for _, name, _ in notes] == [*names]
    assert other.folder.joinpath("note").read_text().split()[0] != notes[0][0]
    assert [run.folder.joinpath("log.txt").read_text().split() for run in runs] == [
        [str(run.journal)] for run in runs
    ]
    shared = Runner([fake(tmp_path / "more", name, "pass") for name in names], 3, None, lambda line: None)
    shared.run()
    assert shared.processes == 3  # more jobs than settings and harnesses share a list


@pytest.mark.parametrize("death", ["import os; os.kill(os.getpid(), 9)", "import os; os._exit(7)"])
def test_a_process_that_dies_loses_only_the_run_that_it_was_in(tmp_path: Path, death: str) -> None:
    count = "p = journal.parents[3] / journal.parent.name; p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    runs = [fake(tmp_path, name, count) for name in ("one", "two", "three")]
    runs[1] = replace(
        runs[1], command=[runs[1].command[0], f"{count}; print('error: out of memory'); {death}"]
    )
    dying = Runner(runs, 1, None, lambda line: None)
    problems = [outcome.problem for outcome in dying.run()]
    assert problems[0] == problems[2] == "" and "out of memory" in problems[1] and "\n" not in problems[1]
    assert dying.processes == 2  # another goes on behind the one that died
    assert [(tmp_path / "out" / run.mode).read_text() for run in runs] == ["x"] * 3
    Runner(runs, 1, None, lambda line: None).run()
    assert [(tmp_path / "out" / run.mode).read_text() for run in runs] == ["x", "xx", "x"]


def test_a_run_that_outlived_its_runner_is_done(tmp_path: Path) -> None:
    code = "p = journal.parent / 'count'; p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    run = fake(tmp_path, "one", code)
    assert run_all([run])[0] == {"one": ""}
    state = read_state(run.folder)
    (run.folder / "run.json").write_text(json.dumps({**state, "state": "running"}))  # as the runner left it
    assert run_all([run])[0] == {"one": ""} and (run.folder / "count").read_text() == "x"
    assert read_state(run.folder)["state"] == "done"


def test_what_a_run_puts_into_the_environment_is_its_own(tmp_path: Path) -> None:
    first = fake(tmp_path, "one", "import os; os.environ['PRED_FORMAT'] = 'tsv'")
    second = fake(tmp_path, "two", "import os; assert 'PRED_FORMAT' not in os.environ")
    assert run_all([first, second])[0] == {"one": "", "two": ""}


def test_a_checkpoint_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynllava_plugin.evaluation.engine.engine import Engine
    from dynllava_plugin.evaluation.settings import ModelSettings
    from dynllava_plugin.evaluation.suite.worker import OneModel

    loaded, load = [], Engine.load
    monkeypatch.setattr(Engine, "load", lambda *given: loaded.append(given) or load(*given))
    model, tiny = OneModel(), ModelSettings("tiny", device="cpu")
    first, second = model(tiny, 2), model(tiny, 4)
    assert first.model is second.model and first is not second and second.batch_size == 4
    assert model(replace(tiny, mode="full"), 4).model is not first.model and len(loaded) == 2
    nowhere = ModelSettings("nowhere/at all")
    for _ in range(2):
        with pytest.raises(UserError):
            model(nowhere, 1)
    assert len(loaded) == 3


def test_resuming_and_staleness(tmp_path: Path) -> None:
    code = "from pathlib import Path; p = Path('count'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    run, count = fake(tmp_path, "one", code), tmp_path / "count"

    def again(**changes: Any) -> int:
        problems, _ = run_all([replace(run, **changes)])
        assert problems == {"one": ""}
        return len(count.read_text())

    assert again() == 1
    run.journal.mkdir()
    (run.journal / "0-1.jsonl").write_text("answers\n")
    (run.output / "results").mkdir(parents=True)
    assert again() == 1  # done
    assert again(scores_from={"judge": "gpt"}) == 2  # scored again, answers kept, old output gone
    assert (run.journal / "0-1.jsonl").is_file() and not (run.output / "results").exists()
    (run.folder / "run.json").write_text("{torn")
    assert again() == 3 and not run.journal.exists()  # nobody knows what the journal was
    run.journal.mkdir()
    assert again(answers_from={"data": 2}) == 4 and not run.journal.exists()  # other data: nothing is reused


def test_a_failed_run_is_tried_again_with_its_journal(tmp_path: Path) -> None:
    failing = fake(tmp_path, "one", "import sys; sys.exit(1)")
    assert run_all([failing])[0]["one"]
    failing.journal.mkdir()
    good = replace(failing, command=["tests.fake_harness", "pass"])
    assert run_all([good])[0] == {"one": ""} and good.journal.is_dir()


def test_two_suites_in_one_folder(tmp_path: Path) -> None:
    inner: list[str] = []

    def meanwhile(line: str) -> None:
        with pytest.raises(UserError, match="another `dynllava eval`, or a run that one left behind"):
            Runner([fake(tmp_path, "two", "pass")], 1, None, print).run()
        inner.append(line)

    Runner([fake(tmp_path, "one", "pass")], 1, None, meanwhile).run()
    assert len(inner) == 1


@pytest.mark.parametrize(
    ("benchmark", "harness", "hint"),
    [
        (
            "GQA",
            "lmms-eval",
            "hf download lmms-lab-encoder/GQA --repo-type dataset --local-dir DIR/datasets/lmms",
        ),
        ("POPE", "vlmevalkit", r"POPE\.tsv isn't here and can't be downloaded; put it into DIR/LMUData"),
        ("VQAv2", "vlmevalkit", "hf download lmms-lab-encoder/VQAv2"),
    ],
)
def test_missing_data_is_named_before_anything_runs(
    benchmark: str, harness: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.setattr(suite_data, "_hub_cache", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    run = fake(tmp_path, "x", "pass", benchmark=find_benchmark(benchmark), harness=harness)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (problem,) = run_all([run])[0].values()
    assert pytest.raises(AssertionError, match=hint).matches(AssertionError(problem)), problem
    assert not (run.folder / "log.txt").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # then it is tried, and the log says why it failed
    offline = "import sys; print('ConnectionError: Max retries'); sys.exit(1)"
    (problem,) = run_all([replace(run, command=["tests.fake_harness", offline])])[0].values()
    assert "can't be downloaded" in problem


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4s"), (65, "1m05s"), (3600 * 2 + 599, "2h09m")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_time_left_counts_questions(tmp_path: Path) -> None:
    """VQAv2 alone has more questions than all others: behind it, what is left isn't as long again each."""
    names = ("VQAv2", "GQA", "POPE")
    runs = [fake(tmp_path, name, "pass", benchmark=find_benchmark(name)) for name in names]
    lines: list[str] = []
    progress = Progress(runs, 1, lines.append)
    progress.finished(Outcome(runs[0], seconds=21435.4, work=21435.4))  # ten questions a second
    progress.finished(
        Outcome(runs[1], problem="out of memory", seconds=3.0, work=3.0)
    )  # says nothing of the rate
    assert lines[0].endswith("about 35m58s left") and lines[1].endswith("about 15m00s left")
    few = [replace(run, answers_from={"limit": 8}) for run in runs]
    progress = Progress(few, 1, lines.append)
    progress.finished(Outcome(few[0], seconds=16.0, work=16.0))
    assert lines[-1].endswith("about 32s left")


def test_answers_of_an_earlier_run_say_nothing_of_the_time_left(tmp_path: Path) -> None:
    run = fake(tmp_path, "one", "pass")
    journal, progress = Journal(run.journal), Progress([run], 1, print)
    journal.expect(1000)
    assert progress._state(run, 4.0).endswith(": 0% of 1,000, 4s")
    journal._reported = 0.0  # as if a second had passed
    journal.count(900)  # in the journal when the run began
    assert progress._state(run, 5.0).endswith(": 90% of 1,000, 5s")
    journal._reported = 0.0
    journal.count(10)
    assert progress._state(run, 15.0).endswith(": 91% of 1,000, 15s, 1m30s left")


COST = st.one_of(st.none(), st.builds(OutputCost, st.integers(0, 9), st.floats(0, 9), st.floats(0, 9)))
SCORE = st.builds(Score, st.floats(-9, 0), st.integers(1, 9), st.booleans(), st.integers(0, 9), COST)
COUNT = st.one_of(st.none(), st.integers(0, 99))


@given(
    answer=st.builds(
        Answer, st.text(), st.integers(1, 99), st.integers(0, 9), COUNT, st.integers(1, 9), COUNT, COUNT, COST
    ),
    score=SCORE,
    rounds=st.lists(SCORE, max_size=3),
)
def test_journal_gives_back_what_was_written(
    answer: Answer, score: Score, rounds: list[Score], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    score = replace(score, rounds=tuple(rounds))
    Journal(folder).write([("a", answer), ("s", score)])
    again = Journal(folder)
    assert again.result("a") == answer and again.result("s") == score and again.result("other") is None


def test_torn_journal_and_progress(tmp_path: Path) -> None:
    answer = Answer("text", 1, 0, 0, 1, 0, 0)
    first = Journal(tmp_path)
    first.expect(3)
    first.write([("a", answer), ("b", answer)])
    first.count(2)
    assert json.loads((tmp_path / "progress-0.json").read_text()) in (
        {"done": 0, "total": 3},
        {"done": 2, "total": 3},
    )
    first.write([("c", answer)])
    first.count(1)
    assert json.loads((tmp_path / "progress-0.json").read_text()) == {"done": 3, "total": 3}
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(path.read_text()[:-30])
    again = Journal(tmp_path)
    assert again.result("b") == answer and again.result("c") is None
    assert entry_key("x", [1, "a"]) == entry_key("x", [1, "a"]) != entry_key("x", [1, "b"])
    nothing = Journal(None)
    nothing.write([("a", answer)])
    assert nothing.result("a") is None


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that knows one model."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = body["model"] == "known" and self.path == "/v1/chat/completions"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": "0.5"}}]}).encode())

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_judge_is_one_that_answers(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_URL", endpoint)
    monkeypatch.setenv("MODEL_VERSION", "known")
    assert judges.find_judge("lmms-eval", ["gqa"]) is None and capsys.readouterr().err == ""
    assert judges.find_judge("lmms-eval", ["mmvet"]) is None
    assert "OPENAI_API_KEY isn't set" in capsys.readouterr().err  # a judge was named, so its silence is told
    monkeypatch.delenv("OPENAI_API_URL")
    assert judges.find_judge("lmms-eval", ["mmvet"]) is None and capsys.readouterr().err == ""
    monkeypatch.setenv("OPENAI_API_URL", endpoint)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert judges.find_judge("lmms-eval", ["gqa"]) is None
    assert judges.find_judge("lmms-eval", ["mmvet", "gqa"]) == judges.Judge("known", endpoint)
    assert judges.find_judge("vlmevalkit", ["LLaVABench"]) is not None
    monkeypatch.setenv("MODEL_VERSION", "other")
    assert judges.find_judge("lmms-eval", ["mmvet"]) is None
    error = capsys.readouterr().err
    assert "refuses model other (404" in error and "mmvet keep their predictions" in error
    assert error.count("\n") == 1 and "secret" not in error
    monkeypatch.setenv("OPENAI_API_URL", "http://127.0.0.1:9/v1")
    assert judges.find_judge("lmms-eval", ["mmvet"]) is None
    assert "doesn't answer" in capsys.readouterr().err


def test_unanswered_samples_are_counted() -> None:
    samples = {
        "mmvet": [
            {"gpt_eval_score": {"score": 0.0, "eval_model": ""}},
            {"gpt_eval_score": {"eval_model": "gpt"}},
        ],
        "llava_in_the_wild": [{"gpt_eval_llava_all": {"scores": [7, 8], "eval_model": "gpt"}}],
        "gqa": [{}],
    }
    assert judges.unanswered(samples) == {"mmvet": 1} and judges.unanswered(None) == {}
