"""The predictions that the harnesses saved, by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import json_lines


def lmms_eval_samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return what lmms-eval logged of a task, by document."""
    files = sorted(folder.rglob(f"*_samples_{task}.jsonl"))
    if not files:
        raise UserError(f"{folder}: no saved samples of {task}")
    rows = [json.loads(line) for _, line in json_lines(files[-1])]
    return sorted(rows, key=lambda row: row["doc_id"])


def lmms_eval_predictions(folder: Path, task: str) -> dict[int, str]:
    """Return lmms-eval's answers by document number."""
    return {row["doc_id"]: _text(row["filtered_resps"]) for row in lmms_eval_samples(folder, task)}


def _text(answer: Any) -> str:
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer if isinstance(answer, str) else json.dumps(answer)


def vlmevalkit_rows(folder: Path, dataset: str) -> list[dict[str, Any]]:
    """Return the kit's prediction file of a dataset, row by row."""
    for path in sorted(folder.rglob(f"dynllava_{dataset}.*")):
        if path.suffix in (".tsv", ".xlsx"):
            return vlmevalkit_table(path).to_dict("records")  # type: ignore[return-value]
    raise UserError(f"{folder}: no saved predictions of {dataset}")


def vlmevalkit_table(path: Path) -> pd.DataFrame:
    """Return the kit's prediction file, ``.tsv`` or ``.xlsx``, each cell as the text that it says."""
    if path.suffix == ".tsv":
        return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    return pd.read_excel(path, dtype=str, keep_default_na=False)


def vlmevalkit_predictions(folder: Path, dataset: str) -> dict[int, str]:
    """Return the kit's answers by row number."""
    return {place: row["prediction"] for place, row in enumerate(vlmevalkit_rows(folder, dataset))}
