"""What a rerun of `dynllava eval` may count as done, and what it leaves behind where it is stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import find_benchmark
from dynllava_plugin.evaluation.locks import locks
from dynllava_plugin.evaluation.results import identity
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.suite import data as suite_data
from dynllava_plugin.evaluation.suite import runs as suite_runs
from dynllava_plugin.evaluation.suite.command import report
from dynllava_plugin.evaluation.suite.runner import WRITER, Outcome, Runner, read_state
from dynllava_plugin.evaluation.suite.runs import Run, plan
from dynllava_plugin.model.checkpoints import sources
from tests.suite_time import children
from tests.test_floors import GRAPH, own, room
from tests.test_paper import write_run
from tests.test_suite import ROOT, config, fake, run_all


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and leave to download."""
    monkeypatch.setattr(suite_data, "_hub_cache", lambda: tmp_path / "cache")
    monkeypatch.setenv("LMUData", str(tmp_path / "LMUData"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def downloading(tmp_path: Path, commit: str) -> Run:
    """A run of GQA that fetches its data at `commit` into the cache, planned with what is there now."""
    gqa = find_benchmark("GQA")
    refs = tmp_path / "cache" / "datasets--lmms-lab-encoder--GQA" / "refs"
    code = f"import os; os.makedirs({str(refs)!r}, exist_ok=True); open({str(refs / 'main')!r}, 'w').write({commit!r})"
    planned = {"data": suite_data.identity(gqa, "lmms-eval", None)}
    return fake(tmp_path, "one", code, benchmark=gqa, answers_from=planned)


def resumed(run: Run) -> bool:
    (outcome,) = Runner([run], 1, None, lambda line: None).run()
    assert not outcome.problem
    return outcome.resumed


def test_a_download_is_not_other_data(tmp_path: Path, cache: Path) -> None:
    first = downloading(tmp_path, "c1")
    assert first.answers_from == {"data": "hub"} and not resumed(first)
    again = downloading(tmp_path, "c1")
    assert again.answers_from == {"data": "c1"} and resumed(again)
    for path in (cache / "datasets--lmms-lab-encoder--GQA" / "refs").iterdir():
        path.unlink()  # the cache was cleared: what is done stays done
    assert resumed(downloading(tmp_path, "c1"))
    newer = replace(downloading(tmp_path, "c2"), answers_from={"data": "c2"})
    newer.journal.mkdir(exist_ok=True)
    assert not resumed(newer) and not newer.journal.exists()


def test_where_a_checkpoint_lies_and_runs_undoes_no_result(tmp_path: Path) -> None:
    """The same checkpoint by content, from another disk or on another GPU: what is done was done again from the start."""
    settings = ModelSettings("tiny", device="cuda:0")

    def run(**changes: Any) -> Run:
        asked = {"settings": replace(settings, **changes).to_dict()}
        return fake(tmp_path, "one", "pass", answers_from=asked)

    assert not resumed(run())
    run().journal.mkdir()
    assert resumed(run(device="cuda:1")) and resumed(run(pretrained="/other/disk/tiny"))
    assert run().journal.is_dir()
    assert not resumed(run(mode="full")) and not run().journal.exists()


def test_wordnet_that_was_installed_later_scores_long_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(benchmark: str) -> Any:
        return plan(config(tmp_path, benchmarks=[benchmark]), None)[0].scores_from

    before = scores("easy_vqa_describe"), scores("GQA")
    other = {"meteor": "meteor_exact_stem", "meteor_exact_stem": "meteor"}[before[0]["meteor"]]
    monkeypatch.setattr(suite_runs, "meteor_name", lambda: other)
    assert scores("easy_vqa_describe") == {**before[0], "meteor": other} and scores("GQA") == before[1]


def test_work_on_the_bench_undoes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("evaluation/results/identity.py", "model/decoder.py", "bench/rows.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "evaluation/results/identity.py"))
    digest = identity.source_digest.__wrapped__
    before = digest()
    (tmp_path / "bench/rows.py").write_text("x = 2")
    assert digest() == before
    (tmp_path / "model/decoder.py").write_text("x = 2")
    assert digest() != before


def test_no_run_goes_through_the_rooms_whose_sources_do_not_count() -> None:
    runs = {"evaluation", "model", "policies", "sparsity", "easy_vqa", "flops", "files", "images"}
    reached = {
        room(target) for module in GRAPH if room(module) in runs for target, _ in GRAPH[module] if own(target)
    }
    assert not reached & set(identity._APART)


def test_an_adapter_is_another_checkpoint_where_its_base_is(tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(b"one")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )

    def digest() -> str:
        identity.checkpoint_hash.cache_clear()
        return identity.checkpoint_hash(str(tmp_path / "adapter"))

    before = digest()
    assert digest() == before
    weights.write_bytes(b"two")
    assert digest() != before


def test_a_result_that_was_removed_is_made_again_from_its_answers(tmp_path: Path) -> None:
    run = fake(tmp_path, "one", "pass")
    assert not resumed(run) and resumed(run)
    run.journal.mkdir()
    for state in ("done", "running"):  # the runner ended well, or was killed before it took note
        shutil.rmtree(run.output)
        file = run.folder / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "state": state}))
        assert not resumed(run) and run.journal.is_dir() and run.output.is_dir()


def test_a_run_killed_behind_its_download_goes_on(tmp_path: Path, cache: Path) -> None:
    run = downloading(tmp_path, "c1")
    killed = replace(run, command=[run.command[0], f"{run.command[1]}; os.kill(os.getpid(), 9)"])
    assert run_all([killed])[0]["one"]
    state = run.folder / "run.json"
    state.write_text(state.read_text().replace('"c1"', '"hub"'))  # the runner was killed too
    run.journal.mkdir()
    assert not resumed(downloading(tmp_path, "c1")) and run.journal.is_dir()


def test_vlmevalkits_vqav2_is_lmms_evals(tmp_path: Path, cache: Path) -> None:
    """The kit's TSV is written by the first run; it is no data of its own."""
    vqav2 = find_benchmark("VQAv2")
    repository = tmp_path / "datasets" / vqav2.repo
    repository.mkdir(parents=True)
    (repository / "data.parquet").write_bytes(b"rows")
    before = suite_data.identity(vqav2, "vlmevalkit", tmp_path)
    (tmp_path / "LMUData").mkdir()
    (tmp_path / "LMUData" / "VQAv2_VAL.tsv").write_text("index")
    assert suite_data.identity(vqav2, "vlmevalkit", tmp_path) == before != "hub"
    assert suite_data.identity(vqav2, "lmms-eval", tmp_path) == before


def test_a_hub_checkpoint_has_one_folder_before_and_after_its_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[bool] = []
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sources, "_download", lambda hub_id, weights: fetched.append(weights) or tmp_path)
    monkeypatch.setattr(identity, "_hub_commit", lambda repo: "abc" if fetched else "unknown")
    identity.checkpoint_hash.cache_clear()
    root = plan(config(tmp_path, pretrained="some/model"), None)[0].folder.parents[1]
    assert root.name == "some-model_abc" and fetched == [False]  # no weights for a plan
    monkeypatch.undo()
    with pytest.raises(UserError, match="no such checkpoint folder"):
        plan(config(tmp_path, pretrained="nowhere at all"), None)


def test_other_code_and_other_images_are_other_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(**overrides: Any) -> dict[str, Any]:
        chosen = config(tmp_path, benchmarks=["LVIS-VQA single"], **overrides)
        return plan(chosen, None)[0].answers_from

    first = answers()
    assert first["sources"] == identity.source_digest() and len(first["sources"]) == 12
    monkeypatch.setattr(suite_runs, "source_digest", lambda: "other")
    assert answers()["sources"] == "other"
    assert answers(images=str(tmp_path))["images"] == str(tmp_path) != first["images"]
    assert "images" not in plan(config(tmp_path), None)[0].answers_from


def test_a_judge_that_vanished_is_not_recorded_as_used(tmp_path: Path, cache: Path) -> None:
    """The suite's judge answered at the start; the run found none, ended well, and is to be scored later."""
    run = fake(tmp_path, "one", "", benchmark=find_benchmark("MM-Vet"), scores_from={"judge": "gpt"})
    write_run(tmp_path / "made", "image", {"mmvet": {"gpt_eval_score,none": 31.0}})
    copy = f"import shutil; shutil.copytree({str(tmp_path / 'made')!r}, {str(run.output)!r})"
    run = replace(run, command=["tests.fake_harness", copy])
    assert not resumed(run) and read_state(run.folder)["scores_from"] == {"judge": None}
    judge = {"model": "gpt", "unanswered": {}}
    write_run(tmp_path / "made", "image", {"mmvet": {"gpt_eval_score,none": 31.0}}, judge=judge)
    assert not resumed(run) and read_state(run.folder)["scores_from"] == {"judge": "gpt"}
    assert resumed(run)


def test_the_suites_table_has_its_own_runs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = config(tmp_path)
    mine = plan(chosen, None)[0]
    write_run(mine.output, "image", {"gqa": {"exact_match,none": 0.5}})
    other = tmp_path / "out" / "old_checkpoint" / "lmms-eval" / "GQA" / "output"
    write_run(other, "full", {"gqa": {"exact_match,none": 0.9}})
    assert report(chosen, [Outcome(mine)]) == 0
    text = (tmp_path / "out" / "table.csv").read_text()
    assert ",image," in text and ",full," not in text and "in 1 run " in capsys.readouterr().out


def test_sigterm_ends_what_is_running(tmp_path: Path) -> None:
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    run, started = fake(tmp_path, "one", code), tmp_path / "pid"

    def terminate() -> None:
        while not (started.exists() and started.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        Runner([run], 1, None, lambda line: None).run()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before and read_state(run.folder)["state"] == "running"


def test_an_orphan_holds_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "setting"
    with locks({folder}, WRITER) as held:
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=list(held.values()))
    try:
        with (
            pytest.raises(UserError, match="or a run that one left behind, is writing there"),
            locks({folder}, WRITER),
        ):
            pass
    finally:
        orphan.kill()
        orphan.wait()
    with locks({folder}, WRITER):
        pass
    # The runner's children are such: they have the lock open.
    look = "import os, sys; fds = os.listdir('/proc/self/fd')\n"
    look += "links = [os.readlink(f'/proc/self/fd/{fd}') for fd in fds if os.path.exists(f'/proc/self/fd/{fd}')]\n"
    look += "sys.exit(not any(link.endswith('setting/.lock') for link in links))"
    assert run_all([fake(tmp_path, "one", look)])[0] == {"one": ""}


WORK = """
import json, os, time
from dynllava_plugin.evaluation.engine.answers import Answer
from dynllava_plugin.evaluation.results.journal import Journal
from dynllava_plugin.files import write_text
time.sleep(0.02)  # loading
book, answers = Journal(journal), {}
for number in range(6):
    found = book.result(str(number))
    if found is None:
        time.sleep(0.01)
        with open(journal.parent / "asked", "a") as file:
            file.write(f"{number} ")
        found = Answer(f"it is {number}", 1, 0, 0, 1, 0, 0)
        book.write([(str(number), found)])
    answers[number] = found.text
time.sleep(0.02)  # scoring
output = journal.parent / "output"
for part in ("results", "samples"):
    write_text(output / part, json.dumps(answers))
    time.sleep(0.01)
"""
STARTED = """
import sys
from pathlib import Path
from dynllava_plugin.evaluation.benchmarks import find_benchmark
from dynllava_plugin.evaluation.suite import progress
from dynllava_plugin.evaluation.suite.runner import Runner
from dynllava_plugin.evaluation.suite.runs import Run
progress.headline = lambda run: ""  # reading results takes seconds to import
place, root, work = sys.argv[1:]
runs = [
    Run(find_benchmark("easy_vqa"), "lmms-eval", name, Path(place, "out/setting/lmms-eval", name), ["tests.fake_harness", work],
        {"PYTHONPATH": root}, Path(place), {"data": 1}, {"judge": None})
    for name in ("a", "b", "c")
]
Runner(runs, 1, None, lambda line: None).run()
"""


def test_killed_anywhere_and_nothing_is_lost(tmp_path: Path) -> None:
    """Runner and process are killed together, at moments of loading, answering, scoring and writing; then it goes on."""
    folder = tmp_path / "out" / "setting"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    chance = random.Random(0)
    for _ in range(5):
        command = [sys.executable, "-c", STARTED, str(tmp_path), str(ROOT), WORK]
        runner = subprocess.Popen(command, env=environment)
        while runner.poll() is None and not children(runner.pid):
            time.sleep(0.005)
        time.sleep(chance.uniform(0.05, 0.35))
        for number in children(runner.pid):
            os.kill(number, signal.SIGKILL)
        runner.kill()
        runner.wait()
        if all(read_state(path).get("state") == "done" for path in folder.glob("*/*") if path.is_dir()):
            break
    runs = [fake(tmp_path, name, WORK) for name in ("a", "b", "c")]
    assert run_all(runs)[0] == dict.fromkeys("abc", "")
    for run in runs:
        said = {str(number): f"it is {number}" for number in range(6)}
        assert [json.loads((run.output / part).read_text()) for part in ("results", "samples")] == [said] * 2
        asked = (run.folder / "asked").read_text().split()
        # An answer is asked for again only where the process died between hearing it and writing it down.
        assert set(asked) == set(said) and len(asked) <= 6 + 5
