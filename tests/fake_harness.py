"""A harness's command line whose one argument is Python: for the suite's processes, which start in a moment then."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(arguments: Sequence[str], load: Any) -> int:
    """Execute the code; its `load`, `journal` and process number are those of a real command."""
    journal = Path(os.environ["DYNLLAVA_JOURNAL"])
    exec(arguments[0], {"load": load, "journal": journal, "pid": os.getpid()})
    return 0
