"""Report."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(rows: list[dict[str, Any]], folder: Path) -> None:
    """Tables and plots of measured rows."""
    from dynllava_plugin.evaluation.files import write_json
    from dynllava_plugin.evaluation.records import host, versions

    write_json(folder / "machine.json", {"host": host(), "versions": versions()})
