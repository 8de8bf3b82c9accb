"""What `lmms_eval` tells before it starts, and in one line where data is missing."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager
from tenacity import Future, RetryError, wait_none

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.lmms_eval.checks import (
    check_conversation,
    check_examples,
    check_model,
    check_tasks,
    checked_generation,
    missing_data,
    tell_test_splits,
    user_error,
)
from dynllava_plugin.evaluation.lmms_eval.tasks import TASKS_FOLDER
from dynllava_plugin.files import check_folder
from tests.commands import LMMS_EVAL, run_command


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((text, text) for text in (None, "", "max_new_tokens=8", "temperature=0", "until=a", "num_beams=2")),
        ("temperature=0.7", "temperature=0.7,do_sample=True"),
        ("temperature=0.7,do_sample=False", "temperature=0.7,do_sample=False"),
        ("top_p=0.9,temperature=1", "top_p=0.9,temperature=1,do_sample=True"),
    ],
)
def test_generation_arguments_are_taken_as_meant(given: str | None, meant: str | None) -> None:
    assert checked_generation(given) == meant


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("temprature=0.7", "--gen_kwargs temprature: no such argument .*did you mean temperature"),
        ("max_new_token=8", "did you mean max_new_tokens"),
        ("stop=a", "--gen_kwargs stop: no such"),
        ("min_p=0.1", "--gen_kwargs min_p: no such"),
        ("num_return_sequences=3", "--gen_kwargs num_return_sequences: no such"),
        ("temperature", "--gen_kwargs temperature: expected name=value"),
        ("temperature=hot", "--gen_kwargs temperature=hot: expected a number"),
        ("temperature=-1", "--gen_kwargs temperature=-1.0: expected a number"),
    ],
)
def test_arguments_that_would_vanish_are_refused(given: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        checked_generation(given)


def test_the_size_of_a_test_split_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tell_test_splits("vqav2_val,gqa,textvqa_test,easy_vqa")
    assert capsys.readouterr().err == ""
    tell_test_splits("vqav2,gqa,vizwiz_vqa")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "vqav2_val and vqav2_test, whose 447,793 questions" in lines[0]


def retried(error: Exception) -> RetryError:
    attempt = Future(3)
    attempt.set_exception(error)
    return RetryError(attempt)


def test_data_that_is_missing_is_named_inside_a_retry() -> None:
    error = retried(ConnectionError("Couldn't reach 'lmms-lab-encoder/VQAv2' on the Hub"))
    found = user_error(error)
    assert found is not None and "dataset lmms-lab-encoder/VQAv2 isn't here" in str(found)
    other = missing_data(retried(ConnectionError("Couldn't reach 'someone/Some-Set' on the Hub")))
    assert other is not None and "hf download someone/Some-Set" in str(other)
    assert user_error(retried(ValueError("something else"))) is None
    assert user_error(retried(UserError("ours"))) is not None


def test_offline_without_data_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's client really raises offline; lmms-eval asks it five times."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", wait_none())
    command = ["--model", "dynllava", "--model_args", "pretrained=tiny", "--tasks", "vqav2,textvqa"]
    done = run_command(LMMS_EVAL, [*command, "--limit", "1"], tmp_path)
    assert done.code == 2 and "447,793 questions" in done.text
    assert "dataset lmms-lab-encoder/" in done.error() and "RetryError" not in done.error()


def test_an_output_place_that_can_t_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere/deep")
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "deep",
        tmp_path / "link",
        Path("/proc/none"),
        Path("/dev/full"),
    ):
        with pytest.raises(UserError, match=f"--output_path {folder}: can't be written"):
            check_folder("--output_path", folder)
    check_folder("--output_path", tmp_path / "new" / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.fixture
def our_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval has our tasks alone."""
    find = TaskManager.initialize_tasks
    ours = {"include_path": str(TASKS_FOLDER), "include_defaults": False}
    monkeypatch.setattr(TaskManager, "initialize_tasks", lambda self, *_, **__: find(self, **ours))


def asked(*names: str) -> Namespace:
    return Namespace(tasks=",".join(names), include_path=None, verbosity="INFO", model="dynllava")


def test_names_groups_wildcards_and_files_go_on(our_tasks: None, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("task: mine")
    check_tasks(asked("easy_vqa", "easy_vqa_describe"))
    check_tasks(asked("easy_vqa_s*", "none*", str(file)))
    check_tasks(asked(str(file), "none*"))
    check_tasks(asked("*"))
    check_tasks(asked(str(tmp_path)))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["easy_vqa", "easy_vqaa"], "--tasks easy_vqaa: no such task; did you mean easy_vqa or "),
        (["none*"], r"--tasks none\*: no such task; `lmms_eval tasks list` lists them"),
        (["easy_vqa", "none.yaml"], r"--tasks none\.yaml: no such task"),
    ],
)
def test_unknown_names_do_not(our_tasks: None, names: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        check_tasks(asked(*names))


def test_models_and_their_aliases() -> None:
    check_model("dynllava")
    check_model("dynamic_llava")
    with pytest.raises(UserError, match="--model dynlava: no such model; did you mean dynllava or"):
        check_model("dynlava")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (
            ["--num_fewshot", "2"],
            2,
            "error: --num_fewshot 2: lmms-eval's task easy_vqa names no examples to show",
        ),
        (
            ["--apply_chat_template", "--fewshot_as_multiturn", "--num_fewshot", "1"],
            2,
            "error: --fewshot_as_multiturn:",
        ),
        (
            ["--apply_chat_template"],
            0,
            "--apply_chat_template: dynllava words every question by its checkpoint's",
        ),
    ],
)
def test_options_of_examples_and_templates(
    flags: list[str], code: int, said: str, tmp_path: Path, easy_vqa_data: Path, our_tasks: None,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from dynllava_plugin.evaluation.lmms_eval.command import run

    command = ["--model", "dynllava", "--model_args", "pretrained=tiny,mode=full", "--tasks", "easy_vqa"]
    command += ["--limit", "1", "--device", "cpu", "--output_path", str(tmp_path), *flags]
    assert run(command) == code
    said_all = capfd.readouterr().err.splitlines()
    assert any(line.startswith(said) for line in said_all)
    assert sum(line.startswith("error: ") for line in said_all) == (code != 0)
    assert not any("Traceback" in line for line in said_all)
    assert bool(list(tmp_path.rglob("*_results.json"))) == (code == 0)


def test_a_task_with_examples_may_show_them() -> None:
    class Task:
        sampler = None

        def get_config(self, name: str) -> int | None:
            return None

    class Without(Task):
        def __init__(self, own: int | None) -> None:
            self.own = own

        def __getattribute__(self, name: str) -> Any:
            if name == "sampler":
                raise AttributeError(name)
            return object.__getattribute__(self, name)

        def get_config(self, name: str) -> int | None:
            return self.own

    check_examples({"group": {"one": Task()}, "two": Without(0)}, 2)
    check_examples({"group": {"one": Without(None)}}, None)
    with pytest.raises(UserError, match="task one names no examples"):
        check_examples({"group": {"one": Without(None)}}, 2)
    plain = Namespace(apply_chat_template=False, fewshot_as_multiturn=False)
    check_conversation(plain)
    assert not plain.apply_chat_template
