"""What papers claim of their methods, in percent of the full model's score: beside a comparison, never in it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import pandas as pd

from dynllava_plugin.evaluation.results.paper import paper_results

MEAN = "mean"
OURS = "Dynamic-LLaVA, tables 1 and 11"
TOKENS = {"llava": 576}  # of an image whole, where a source's budget is a number of tokens
COLUMNS = ("method", "source", "link", "family", "tokens", "benchmark", "value")


def published(family: str, budgets: Sequence[float], image_tokens: float) -> pd.DataFrame:
    """Return the claims about a family (the `model_type` of its stock config): a figure a row, columns `COLUMNS`.

    Of budgets in tokens only those that are within a quarter of one of `budgets`, and none where images have other than the
    family's number of tokens (`image_tokens`): 64 of a tiny model's 64 are no budget.
    `tokens` is what the source calls the budget; `value` the percentage of the full model's score, of one benchmark or the mean over
    the source's own choice of them. What a source gives as scores is divided by its own full model's.
    """
    with (files(__package__) / "literature.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file)
    table = pd.concat([table, _paper()], ignore_index=True)
    table = table[table["family"] == family]
    tokens = pd.to_numeric(table["tokens"], errors="coerce")
    same = image_tokens == TOKENS.get(family, image_tokens)
    near = [(abs(tokens - budget) <= budget / 4) & same for budget in budgets]
    wanted = pd.concat([tokens.isna(), *near], axis=1).any(axis=1)
    return table.loc[tokens[wanted].sort_values(ascending=False, kind="stable").index]


def _paper() -> pd.DataFrame:
    """The paper's own table of LLaVA-1.5-7B, whose means are over what each method was run on."""
    rows = paper_results()
    rows = rows[(rows["table"] == "1/11") & (rows["llm"] == "7B")]
    full = rows[rows["method"] == "LLaVA-1.5"].set_index("benchmark")["value"]
    found = []
    for (method, tokens), group in rows[rows["image_tokens"] < 576].groupby(["method", "image_tokens"]):
        shares = 100 * group.set_index("benchmark")["value"] / full
        shares = shares.dropna()
        values = {**shares.to_dict(), MEAN: shares.mean()}
        common = (method, OURS, "https://arxiv.org/abs/2412.00876", "llava", f"{tokens:g}")
        found += [(*common, benchmark, value) for benchmark, value in values.items()]
    return pd.DataFrame(found, columns=list(COLUMNS))
