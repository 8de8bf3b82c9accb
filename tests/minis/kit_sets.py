"""VLMEvalKit's TSV files as miniatures: the columns each dataset class reads, images in base64."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.files import write_text
from tests.minis.hub_choice import cv_bench_prompt, four_choices
from tests.minis.hub_modern import asks_openly
from tests.minis.items import Item, items_of

Row = dict[str, Any]
CIRCULAR = 1_000_000


def _base(item: Item) -> Row:
    return {
        "index": item.number,
        "image": base64.b64encode(item.image).decode("ascii"),
        "question": item.question,
    }


def _gqa() -> list[Row]:
    return [{**_base(item), "answer": item.answer} for item in items_of("GQA")]


def _textvqa() -> list[Row]:
    return [{**_base(item), "answer": str(list(item.answers))} for item in items_of("TextVQA")]


def _vizwiz() -> list[Row]:
    return [{**_base(item), "answers": str(list(item.answers))} for item in items_of("VizWiz")]


def _scienceqa() -> list[Row]:
    return [
        {
            **_base(item),
            **_options(item, "ABCDE"),
            "hint": item.hint,
            "answer": item.letter,
            "category": "Shapes",
            "split": "test",
        }
        for item in items_of("SciQA")
    ]


def _seedbench() -> list[Row]:
    rows = []
    for item in items_of("SEED"):
        choices = four_choices(item)
        letters = dict(zip("ABCD", choices, strict=True))
        answer = "ABCD"[choices.index(item.answer)]
        rows.append({**_base(item), **letters, "answer": answer, "category": "Instance Attributes"})
    return rows


def _realworldqa() -> list[Row]:
    return [{**_base(item), **_options(item), "answer": item.letter} for item in items_of("RealWorldQA")]


def _mmbench(name: str = "MMBench") -> list[Row]:
    """Each question once for each place its options can start at; copies name the image's first row."""
    rows = []
    for item in items_of(name):
        choices = list(item.choices)
        for turn in range(len(choices)):
            turned = choices[turn:] + choices[:turn]
            letters = dict(zip("ABCD", [*turned, "", ""], strict=False))
            first = item.number + 1  # the image column: 64 characters or fewer name another row
            row = {**_base(item), "index": first + turn * CIRCULAR, "hint": item.hint, **letters}
            row |= {"image": str(first)} if turn else {}
            row |= {"answer": "ABCD"[turned.index(item.answer)], "category": item.category}
            row |= {"l2-category": "finegrained_perception (instance-level)", "split": "dev"}
            rows.append({**row, "source": item.source})
    return rows


def _mmvp() -> list[Row]:
    return [{**_base(item), **_options(item, "AB"), "answer": item.letter} for item in items_of("MMVP")]


def _cv_bench() -> list[Row]:
    return [
        {
            **_base(item),
            "prompt": cv_bench_prompt(item),
            **_options(item),
            "answer": item.letter,
            "split": "2D",
            "source": item.source,
            "category": "Count",
        }
        for item in items_of("CVBench-2D")
    ]


def _pope() -> list[Row]:
    return [
        {**_base(item), "answer": item.answer.capitalize(), "category": item.category}
        for item in items_of("POPE")
    ]


def _mme() -> list[Row]:
    return [
        {
            **_base(item),
            "image_path": f"{item.category}/{item.image_id}.png",
            "question": f"{item.question} Please answer yes or no.",
            "answer": item.answer.capitalize(),
            "category": item.category,
        }
        for item in items_of("MME")
    ]


def _mmvet() -> list[Row]:
    return [{**_base(item), "answer": item.answer, "category": "rec"} for item in items_of("MM-Vet")]


def _llavabench() -> list[Row]:
    return [
        {
            **_base(item),
            "category": item.category,
            "caption": f"a shape; {item.question} {item.answer}",
            "gpt4_ans": f"It is {item.answer}.",
        }
        for item in items_of("LLaVA-Wild")
    ]


def _answers(name: str) -> list[Row]:
    """DocVQA, InfoVQA, OCRBench: a list of right answers, as text."""
    rows = [{**_base(item), "answer": str([item.answer])} for item in items_of(name)]
    categories = [item.category for item in items_of(name)]
    return [{**row, "category": kind} if kind else row for row, kind in zip(rows, categories, strict=True)]


def _chartqa() -> list[Row]:
    kinds = ("test_human", "test_augmented")
    return [
        {**_base(item), "answer": item.answer, "split": kinds[item.number % 2]}
        for item in items_of("ChartQA")
    ]


def _letters(name: str, split: str) -> list[Row]:
    return [
        {
            **_base(item),
            **_options(item),
            "answer": item.letter,
            "category": item.category or "partsOfA",
            "split": split,
        }
        for item in items_of(name)
    ]


def _mmmu() -> list[Row]:
    """The validation split and two questions of the dev split, of which every fourth is open."""
    rows = []
    for item in items_of("MMMU"):
        row = {
            **_base(item),
            "question": f"<image 1> {item.question}",
            **_options(item),
            "answer": item.letter,
        }
        if asks_openly(item):  # no options, and the answer itself
            row |= {**dict.fromkeys("ABCD", ""), "answer": item.answer}
        rows.append({**row, "id": f"validation_Art_{item.number}", "category": "Art", "split": "validation"})
    dev = [{**row, "index": 100 + place, "split": "dev"} for place, row in enumerate(rows[:2])]
    return [*rows, *dev]


def _amber() -> list[Row]:
    return [
        {
            **_base(item),
            "image_path": f"{item.image_id}.jpg",
            "answer": item.answer,
            "category": item.category,
        }
        for item in items_of("AMBER")
    ]


def _options(item: Item, letters: str = "ABCD") -> Row:
    return {letter: item.options().get(letter, "") for letter in letters}


TSVS: dict[str, Callable[[], list[Row]]] = {
    "GQA_TestDev_Balanced": _gqa,
    "TextVQA_VAL": _textvqa,
    "VizWiz": _vizwiz,
    "ScienceQA_TEST": _scienceqa,
    "SEEDBench_IMG": _seedbench,
    "RealWorldQA": _realworldqa,
    "MMBench_DEV_EN": _mmbench,
    "MMVP": _mmvp,
    "CV-Bench-2D": _cv_bench,
    "POPE": _pope,
    "MME": _mme,
    "MMVet": _mmvet,
    "LLaVABench": _llavabench,
    "DocVQA_VAL": lambda: _answers("DocVQA"),
    "InfoVQA_VAL": lambda: _answers("InfoVQA"),
    "ChartQA_TEST": _chartqa,
    "OCRBench": lambda: _answers("OCRBench"),
    "AI2D_TEST": lambda: _letters("AI2D", "test"),
    "MMStar": lambda: _letters("MMStar", "val"),
    "MMMU_DEV_VAL": _mmmu,
    "MMBench_DEV_CN": lambda: _mmbench("MMBench-CN"),
    "AMBER": _amber,
}


def write_tsvs(folder: Path) -> None:
    """Write every dataset's TSV to `folder`, the kit's ``$LMUData``."""
    for name, rows in TSVS.items():
        write_text(folder / f"{name}.tsv", pd.DataFrame(rows()).to_csv(sep="\t", index=False))
