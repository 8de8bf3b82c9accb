"""LLaVA-1.5's own wording of the questions that VLMEvalKit words otherwise."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import pandas as pd

from dynllava_plugin.easy_vqa.writing import SHORT_ANSWER

LETTER = "\nAnswer with the option's letter from the given choices directly."
_CHINESE = "\n请直接回答选项字母。"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_YES_NO = "Please answer yes or no."
_SHORT = {"VizWiz": UNANSWERABLE + SHORT_ANSWER, "POPE": SHORT_ANSWER, "MME": SHORT_ANSWER}
# CV-Bench's rows bring their own prompt; of the other multiple-choice sets the registry has these.
_CHOICES = (
    "MMBench_DEV_EN",
    "MMBench_DEV_CN",
    "AI2D_TEST",
    "MMStar",
    "ScienceQA_TEST",
    "ScienceQA_VAL",
    "SEEDBench_IMG",
    "MMVP",
    "RealWorldQA",
)


def has_own_wording(dataset: str | None) -> bool:
    """Whether LLaVA-1.5 asks the dataset's questions in other words than the kit."""
    return dataset in _SHORT or dataset in _CHOICES


def llava_question(dataset: str, line: Mapping[str, Any]) -> str:
    """Return the question as LLaVA-1.5's evaluation words it.

    Parameters
    ----------
    dataset : str
        One that `has_own_wording`.
    line : mapping
        A row of the kit's TSV.
    """
    question = str(line["question"]).strip()
    if dataset in _SHORT:
        return question.removesuffix(_YES_NO).strip() + _SHORT[dataset]
    if _given(line, "hint"):
        question = f"{line['hint']}\n{question}"
    letters = [letter for letter in string.ascii_uppercase if _given(line, letter)]
    return (
        question
        + "".join(f"\n{letter}. {line[letter]}" for letter in letters)
        + (_CHINESE if dataset.endswith("_CN") else LETTER)
    )


def _given(line: Mapping[str, Any], column: str) -> bool:
    return column in line and not pd.isna(line[column])
