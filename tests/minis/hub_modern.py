"""The hub's repositories of the benchmarks that newer models are measured on, as miniatures."""

from __future__ import annotations

from tests.minis.hub import Config, Row, Schema, image
from tests.minis.items import Item, items_of

STRINGS = ["string"]
_DOCVQA: dict[str, Schema] = {
    "questionId": "string",
    "question": "string",
    "question_types": STRINGS,
    "image": "image",
    "docId": "int64",
    "ucsf_document_id": "string",
    "ucsf_document_page_no": "string",
    "answers": STRINGS,
    "data_split": "string",
}
_INFOVQA: dict[str, Schema] = {
    "questionId": "string",
    "question": "string",
    "answers": STRINGS,
    "answer_type": STRINGS,
    "image": "image",
    "image_url": "string",
    "operation/reasoning": STRINGS,
    "ocr": "string",
    "data_split": "string",
}
_CHARTQA = {"type": "string", "question": "string", "answer": "string", "image": "image"}
_OCRBENCH: dict[str, Schema] = {
    "dataset": "string",
    "question": "string",
    "question_type": "string",
    "answer": STRINGS,
    "image": "image",
}
_AI2D: dict[str, Schema] = {"question": "string", "options": STRINGS, "answer": "string", "image": "image"}
_MMSTAR: dict[str, Schema] = {
    "index": "int64",
    "question": "string",
    "image": "image",
    "answer": "string",
    "category": "string",
    "l2_category": "string",
    "meta_info": {"image_path": "string", "source": "string", "split": "string"},
}
_MMMU: dict[str, Schema] = {
    "id": "string",
    "question": "string",
    "options": "string",
    "explanation": "string",
    **{f"image_{number}": "image" for number in range(1, 8)},
    "img_type": "string",
    "answer": "string",
    "topic_difficulty": "string",
    "question_type": "string",
    "subfield": "string",
}


def _asked(item: Item) -> Row:
    return {"question": item.question, "image": image(item.image, f"{item.image_id}.png")}


def docvqa() -> dict[str, Config]:
    """Two benchmarks in one repository: documents and infographics."""
    common = {"data_split": "val"}
    documents = [
        {**_asked(item), **common, "questionId": str(item.number), "answers": [item.answer], "docId": 1}
        for item in items_of("DocVQA")
    ]
    graphics = [
        {**_asked(item), **common, "questionId": str(item.number), "answers": [item.answer]}
        for item in items_of("InfoVQA")
    ]
    return {
        "DocVQA": Config(_DOCVQA, {"validation": documents}, "DocVQA/"),
        "InfographicVQA": Config(_INFOVQA, {"validation": graphics}, "InfographicVQA/"),
    }


def chartqa() -> dict[str, Config]:
    """Half asked by people, half by a machine."""
    kinds = ("human_test", "augmented_test")
    rows = [
        {**_asked(item), "answer": item.answer, "type": kinds[item.number % 2]}
        for item in items_of("ChartQA")
    ]
    return {"default": Config(_CHARTQA, {"test": rows})}


def ocrbench() -> dict[str, Config]:
    """`question_type` is one of ten."""
    rows = [
        {**_asked(item), "dataset": "IIIT5K", "question_type": item.category, "answer": [item.answer]}
        for item in items_of("OCRBench")
    ]
    return {"default": Config(_OCRBENCH, {"test": rows})}


def ai2d() -> dict[str, Config]:
    """`answer` is the option's index, as text."""
    rows = [
        {**_asked(item), "options": list(item.choices), "answer": str(item.choices.index(item.answer))}
        for item in items_of("AI2D")
    ]
    return {"default": Config(_AI2D, {"test": rows})}


def mmstar() -> dict[str, Config]:
    """The question holds its options."""
    rows = [
        {
            **_asked(item),
            "index": item.number,
            "question": mmstar_question(item),
            "answer": item.letter,
            "category": item.category,
            "l2_category": item.hint,
            "meta_info": {"image_path": f"images/{item.number}.jpg", "source": "MMBench", "split": "val"},
        }
        for item in items_of("MMStar")
    ]
    return {"default": Config(_MMSTAR, {"val": rows}, "mmstar.parquet")}


def mmstar_question(item: Item) -> str:
    """MMStar's own wording of question and options."""
    options = ", ".join(f"{letter}: {text}" for letter, text in item.options().items())
    return f"{item.question}\nOptions: {options}"


def mmmu() -> dict[str, Config]:
    """Multiple choice, and every fourth an open question; ``<image 1>`` says where the image goes."""
    rows = []
    for item in items_of("MMMU"):
        is_open = asks_openly(item)
        rows.append(
            {
                "id": f"validation_{('Art', 'Math')[item.number % 2]}_{item.number}",
                "question": f"<image 1> {item.question}",
                "options": str([] if is_open else list(item.choices)),
                "explanation": "",
                "image_1": image(item.image, f"{item.image_id}.png"),
                "img_type": "['Paintings']",
                "answer": item.answer if is_open else item.letter,
                "topic_difficulty": "Easy",
                "question_type": "open" if is_open else "multiple-choice",
                "subfield": "Drawing",
            }
        )
    return {"default": Config(_MMMU, {"validation": rows})}


def asks_openly(item: Item) -> bool:
    """Whether MMMU's row has no options."""
    return item.number % 4 == 3
