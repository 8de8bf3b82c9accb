"""The hub's repositories of the multiple-choice benchmarks, as miniatures."""

from __future__ import annotations

from tests.minis.hub import Config, Row, image
from tests.minis.items import Item, items_of

STRINGS = ["string"]
LETTER_ONLY = "Please answer directly with only the letter of the correct option and nothing else."
ONE_WORD = "Please answer directly with a single word or number."
_SCIENCEQA = {
    "image": "image",
    "question": "string",
    "choices": STRINGS,
    "answer": "int8",
    "hint": "string",
    "task": "string",
    "grade": "string",
    "subject": "string",
    "topic": "string",
    "category": "string",
    "skill": "string",
    "lecture": "string",
    "solution": "string",
}
_MMBENCH = {
    "index": "int64",
    "question": "string",
    "hint": "string",
    "answer": "string",
    "A": "string",
    "B": "string",
    "C": "string",
    "D": "string",
    "category": "string",
    "image": "image",
    "source": "string",
    "L2-category": "string",
    "comment": "string",
    "split": "string",
}
_SEED = {
    "answer": "string",
    "choice_a": "string",
    "choice_b": "string",
    "choice_c": "string",
    "choice_d": "string",
    "data_id": "string",
    "data_type": "string",
    "question": "string",
    "question_id": "string",
    "question_type_id": "int16",
    "image": ["image"],
    "segment": ["int64"],
}
_CV_BENCH = {
    "idx": "int64",
    "type": "string",
    "task": "string",
    "image": "image",
    "question": "string",
    "choices": STRINGS,
    "answer": "string",
    "prompt": "string",
    "filename": "string",
    "source": "string",
    "source_dataset": "string",
    "source_filename": "string",
    "target_class": "string",
    "target_size": "int64",
    "bbox": [["float64"]],
}


def _png(item: Item) -> dict[str, object]:
    return image(item.image, f"{item.image_id}.png")


def scienceqa() -> dict[str, Config]:
    """Questions with an image; `answer` is the choice's index."""
    rows = [
        {
            "image": _png(item),
            "question": item.question,
            "choices": list(item.choices),
            "answer": item.choices.index(item.answer),
            "hint": item.hint,
            "task": "closed choice",
            "grade": "grade1",
            "subject": "natural science",
            "topic": "shapes",
            "category": "Shapes",
            "skill": "Recognise shapes",
            "lecture": "",
            "solution": "",
        }
        for item in items_of("SciQA")
    ]
    return {"ScienceQA-IMG": Config(_SCIENCEQA, {"test": rows}, "ScienceQA-IMG/")}


def mmbench() -> dict[str, Config]:
    """English and Chinese dev; absent options and hints are the text "nan"."""
    return {
        "en": Config(_MMBENCH, {"dev": _mmbench("MMBench")}, "en/"),
        "cn": Config(_MMBENCH, {"dev": _mmbench("MMBench-CN")}, "cn/"),
    }


def _mmbench(name: str) -> list[Row]:
    return [
        {
            "index": item.number,
            "question": item.question,
            "hint": item.hint or "nan",
            "answer": item.letter,
            **{letter: item.options().get(letter, "nan") for letter in "ABCD"},
            "category": item.category,
            "image": _png(item),
            "source": item.source,
            "L2-category": "finegrained_perception (instance-level)",
            "comment": "nan",
            "split": "dev",
        }
        for item in items_of(name)
    ]


def seedbench() -> dict[str, Config]:
    """Four choices always; a video is several frames."""

    def row(item: Item, kind: str, frames: int) -> dict[str, object]:
        choices = four_choices(item)
        return {
            "answer": "ABCD"[choices.index(item.answer)],
            **{f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)},
            "data_id": item.image_id,
            "data_type": kind,
            "question": item.question,
            "question_id": f"{kind}_{item.number}",
            "question_type_id": 1 if kind == "image" else 10,
            "image": [_png(item)] * frames,
            "segment": [] if kind == "image" else [0, 1],
        }

    rows = [row(item, "image", 1) for item in items_of("SEED")]
    rows += [row(item, "video", 2) for item in items_of("SEED videos")]
    return {"default": Config(_SEED, {"test": rows})}


def four_choices(item: Item) -> list[str]:
    """The item's choices, filled up to four."""
    filling = [name for name in ("none of these", "several", "unclear") if name not in item.choices]
    return [*item.choices, *filling][:4]


def mmvp() -> dict[str, Config]:
    """Rows 2i and 2i + 1 ask the same of two images."""
    rows = [
        {
            "Index": item.number + 1,
            "Question": item.question,
            "Options": " ".join(f"({letter.lower()}) {text}" for letter, text in item.options().items()),
            "Correct Answer": f"({item.letter.lower()})",
            "image": _png(item),
        }
        for item in items_of("MMVP")
    ]
    schema = {
        "Index": "int64",
        "Question": "string",
        "Options": "string",
        "Correct Answer": "string",
        "image": "image",
    }
    return {"default": Config(schema, {"train": rows})}


def realworldqa() -> dict[str, Config]:
    """Half with options and a letter as answer, half with a word."""
    rows = []
    for item in items_of("RealWorldQA"):
        options = "\n".join(f"{letter}. {text}" for letter, text in item.options().items())
        lettered = asks_letter(item)
        question = (
            f"{item.question}\n\n{options}\n{LETTER_ONLY}" if lettered else f"{item.question}\n{ONE_WORD}"
        )
        rows.append(
            {
                "image": _png(item),
                "question": question,
                "answer": item.letter if lettered else item.answer,
                "image_path": f"{item.number}.webp",
            }
        )
    schema = {"image": "image", "question": "string", "answer": "string", "image_path": "string"}
    return {"default": Config(schema, {"test": rows})}


def asks_letter(item: Item) -> bool:
    """Whether RealWorldQA's row wants a letter."""
    return item.number % 2 == 0


def cv_bench() -> dict[str, Config]:
    """The 2D configuration; the prompt holds the choices, the answer is like "(A)"."""
    rows = [
        {
            "idx": item.number,
            "type": "2D",
            "task": "Count",
            "image": _png(item),
            "question": item.question,
            "choices": list(item.choices),
            "answer": f"({item.letter})",
            "prompt": cv_bench_prompt(item),
            "filename": f"img/2D/count/{item.number}.png",
            "source": item.source,
            "source_dataset": item.source,
            "source_filename": f"{item.image_id}.png",
            "target_class": None,
            "target_size": None,
            "bbox": None,
        }
        for item in items_of("CVBench-2D")
    ]
    return {"2D": Config(_CV_BENCH, {"test": rows}, "test_2d.parquet")}


def cv_bench_prompt(item: Item) -> str:
    """CV-Bench's own wording of question and choices."""
    options = "\n".join(f"({letter}) {text}" for letter, text in item.options().items())
    return f"{item.question} Select from the following choices.\n{options}"
