"""Which `--tasks` lmms-eval is let go on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmms_eval.tasks import TaskManager

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.lmms_eval.names import check_model, watch_task_names
from dynllava_plugin.evaluation.lmms_eval.tasks import TASKS_FOLDER


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """A manager of our tasks alone."""
    monkeypatch.setattr(TaskManager, "match_tasks", TaskManager.match_tasks)  # put back behind the test
    watch_task_names()
    return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)


def test_names_groups_wildcards_and_files_go_on(tasks: TaskManager, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("task: mine")
    assert tasks.match_tasks(["easy_vqa", "easy_vqa_describe"]) == ["easy_vqa", "easy_vqa_describe"]
    assert tasks._name_is_group("easy_vqa_describe") or tasks._name_is_tag("easy_vqa_describe")
    assert tasks.match_tasks(["easy_vqa_s*", "none*", str(file)]) == ["easy_vqa_scenes"]
    assert tasks.match_tasks([str(file), "none*"]) == []
    assert "easy_vqa_scenes" in tasks.match_tasks(["*"])


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["easy_vqa", "easy_vqaa"], "--tasks easy_vqaa: no such task; did you mean easy_vqa or "),
        (["none*"], r"--tasks none\*: no such task; `lmms_eval tasks list` lists them"),
        (["easy_vqa", "none.yaml"], r"--tasks none\.yaml: no such task"),
    ],
)
def test_unknown_names_do_not(tasks: TaskManager, names: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        tasks.match_tasks(names)


def test_models_and_their_aliases() -> None:
    check_model("dynllava")
    check_model("dynamic_llava")
    with pytest.raises(UserError, match="--model dynlava: no such model; did you mean dynllava or"):
        check_model("dynlava")
