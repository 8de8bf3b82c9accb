"""Whether a phase is ever slower than full context, by default settings, from batch 1 to 32."""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd

SHAPES, BATCHES = ("llava-1.5-7b", "llava-1.5-13b"), (1, 4, 8, 16, 32)
PHASES, MODES = ("prefill", "decode"), ("image", "image_text", "fastv")
ROW = ["device", "shape", "phase", "mode"]


def never_slower(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: speed-ups over full context in one run, a column a batch size, and in brackets their share of the ideal.

    A GPU's default is the captured path, whose rows are "static"; of decode steps those behind the most generated tokens count.
    The paper's shapes are there on a GPU whether they were measured or not.
    """
    table = pd.DataFrame([row for row in rows if row["phase"] in PHASES and row.get("mode") in MODES])
    if table.empty:
        return ""
    default = table["device"].map(lambda device: "eager" if device == "cpu" else "static")
    table = (
        table[table["path"] == default].sort_values("length").drop_duplicates([*ROW, "batch"], keep="last")
    )
    table["cell"] = table.apply(lambda row: f"{row['speedup']:.2f} ({row['of_ideal']:.2f})", axis=1)
    places = list(dict.fromkeys(zip(table["device"], table["shape"], strict=True)))
    places += [("a CUDA GPU", shape) for shape in SHAPES if all(shape != known for _, known in places)]
    index = pd.MultiIndex.from_tuples(
        [(*place, *rest) for place in places for rest in product(PHASES, MODES)], names=ROW
    )
    shown = table.pivot(index=ROW, columns="batch", values="cell").reindex(index, columns=list(BATCHES))
    shown = shown.fillna("not measured").add_prefix("batch ").reset_index()
    return f"## Never slower than full context\n\n{shown.to_markdown(index=False, disable_numparse=True)}"
