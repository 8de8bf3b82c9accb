"""Names that lmms-eval doesn't know are said in one line with the nearest ones, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError, nearest


def check_model(name: str) -> None:
    """`UserError` for a model that lmms-eval hasn't got."""
    from lmms_eval.models import list_available_models

    known = list_available_models(include_aliases=True)
    if name not in known:
        near = nearest(name, known, "`lmms_eval models --aliases` lists them")
        raise UserError(f"--model {name}: no such model; {near}")


def watch_task_names() -> None:
    """Let lmms-eval's own matching of `--tasks` (groups, tags, wildcards) end in a `UserError` where a name is unknown."""
    from lmms_eval.tasks import TaskManager

    match = TaskManager.match_tasks

    def matched(self: Any, task_list: list[str]) -> list[str]:
        found: list[str] = match(self, task_list)
        others = [name for name in task_list if name not in found and not Path(name).is_file()]
        nothing = not found and len(others) == len(task_list)
        wrong = [
            name for name in others if "*" not in name or nothing
        ]  # one wildcard of several may match none
        if wrong:
            near = nearest(wrong[0], self.all_tasks, "`lmms_eval tasks list` lists them")
            raise UserError(f"--tasks {wrong[0]}: no such task; {near}")
        return found

    TaskManager.match_tasks = matched  # type: ignore[method-assign]
