"""`python -m dynllava_plugin.evaluation.suite.worker PLAN`: one process, one checkpoint in memory, one command after another.

Each command is a harness's own command line with a log, a journal and an output folder of its own. One that fails ends
nothing but itself; where the process dies, its parent starts another for the commands that are left.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.results.journal import VARIABLE
from dynllava_plugin.files import write_json

ENDED = "ended.json"


class OneModel:
    """Gives an engine around the checkpoint that was loaded last, where it is asked for with the same settings.

    Attributes
    ----------
    loaded_at : float
        `time.monotonic()` when it was there.
    """

    def __init__(self) -> None:
        self.loaded_at = 0.0
        self._settings: Any = None
        self._loaded: tuple[Any, Any] | None = None
        self._problem: UserError | None = None

    def __call__(self, settings: Any, batch_size: int | str) -> Any:
        """Return an `Engine` of its own counts; what can't be loaded is tried once, and its error is each command's."""
        from dynllava_plugin.evaluation.engine.engine import Engine

        if settings != self._settings:
            self._settings, self._loaded, self._problem = settings, None, None
        if self._problem is not None:
            raise self._problem
        if self._loaded is not None:
            return Engine(*self._loaded, batch_size, settings.system_prompt, settings.video_frames)
        try:
            engine = Engine.load(settings, batch_size)
        except UserError as problem:
            self._problem = problem
            raise
        self._loaded, self.loaded_at = (engine.model, engine.processor), time.monotonic()
        return engine


def main(plan: Path) -> int:
    """Carry out the commands of a plan in order.

    Parameters
    ----------
    plan : Path
        JSON: a list of ``{"folder": ..., "command": [module, argument, ...]}``. The module has a function
        ``run(arguments, load)`` that returns an exit status. Beside a folder's log its ``ended.json`` says how it ended
        and after how many seconds, loading left out.

    Returns
    -------
    int
        0; where several processes share the commands, the status of one that failed: the others wait for it in vain.
    """
    load, shared = OneModel(), int(os.environ.get("WORLD_SIZE", 1)) > 1
    for item in json.loads(plan.read_text(encoding="utf-8")):
        folder, before = Path(item["folder"]), dict(os.environ)
        _log_to(folder / "log.txt")
        os.environ[VARIABLE] = str(folder / "journal")
        started = time.monotonic()
        code = carry_out(item["command"], load)
        os.environ.clear()
        os.environ.update(before)
        if shared and code:
            return code
        if int(os.environ.get("RANK", 0)) == 0:
            seconds = time.monotonic() - max(started, load.loaded_at)
            write_json(folder / ENDED, {"code": code, "seconds": round(seconds, 2)})
    if shared:
        from dynllava_plugin.evaluation.vlmevalkit.setup import leave_processes

        leave_processes()
    return 0


def carry_out(command: list[str], load: OneModel) -> int:
    """Return the exit status of a module's ``run(arguments, load)``, with 1 for what it raised, which is printed."""
    try:
        return int(import_module(command[0]).run(command[1:], load=load) or 0)
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _log_to(path: Path) -> None:
    """Let all that this process and its libraries print go there."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
