"""The harnesses' commands in this process, as a suite's process carries them out: one import, one checkpoint in memory."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from dynllava_plugin.evaluation.suite.worker import OneModel, carry_out

LMMS_EVAL = "dynllava_plugin.evaluation.lmms_eval.command"
VLMEVALKIT = "dynllava_plugin.evaluation.vlmevalkit.command"
_LOAD = OneModel()


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    text: str
    folder: Path

    def error(self) -> str:
        """Its one error line."""
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.text[-3000:]
        return lines[0]


def run_command(module: str, arguments: list[str], folder: Path, **environment: str) -> Finished:
    """Run a harness's command line in `folder`; the environment and the working directory are restored."""
    before, where, said = dict(os.environ), Path.cwd(), io.StringIO()
    os.environ.update(environment)
    os.chdir(folder)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            code = carry_out([module, *arguments], _LOAD)
    finally:
        os.chdir(where)
        os.environ.clear()
        os.environ.update(before)
    return Finished(code, said.getvalue(), folder)
