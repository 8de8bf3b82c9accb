"""The hub's repositories of the benchmarks with short or free answers, as miniatures."""

from __future__ import annotations

from tests.minis.hub import Config, Row, image
from tests.minis.items import Item, items_of

STRINGS = ["string"]
_VQAV2 = {
    "question_type": "string",
    "multiple_choice_answer": "string",
    "answers": [{"answer": "string", "answer_confidence": "string", "answer_id": "int64"}],
    "image_id": "int64",
    "answer_type": "string",
    "question_id": "int64",
    "question": "string",
    "image": "image",
}
_TEXTVQA = {
    "image_id": "string",
    "question_id": "int32",
    "question": "string",
    "question_tokens": STRINGS,
    "image": "image",
    "image_width": "int32",
    "image_height": "int32",
    "flickr_original_url": "string",
    "flickr_300k_url": "string",
    "answers": STRINGS,
    "image_classes": STRINGS,
    "set_name": "string",
    "ocr_tokens": STRINGS,
}
_OBJECTS = [{"objectId": "string", "value": "string"}]
_GQA = {
    "id": "string",
    "imageId": "string",
    "question": "string",
    "answer": "string",
    "fullAnswer": "string",
    "isBalanced": "bool",
    "groups": {"global": "string", "local": "string"},
    "entailed": "string",
    "equivalent": "string",
    "types": {"structural": "string", "semantic": "string", "detailed": "string"},
    "annotations": {"question": _OBJECTS, "answer": _OBJECTS, "fullAnswer": _OBJECTS},
    "semantic": [{"operation": "string", "argument": "string", "dependencies": ["int32"]}],
    "semanticStr": "string",
}
_POPE = {
    "id": "string",
    "question_id": "string",
    "question": "string",
    "answer": "string",
    "image_source": "string",
    "image": "image",
    "category": "string",
}


def _png(item: Item) -> dict[str, object]:
    return image(item.image, f"{item.image_id}.png")


def vqav2() -> dict[str, Config]:
    """Validation with ten answers, test without any."""

    def rows(items: list[Item], answered: bool) -> list[Row]:
        out = []
        for item in items:
            answers = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": place}
                for place, answer in enumerate(item.answers, 1)
            ]
            row = {
                "question_type": " ".join(item.question.split()[:2]),
                "image_id": int(item.image_id),
                "question_id": int(item.image_id) * 1000 + item.number,
                "question": item.question,
                "image": _png(item),
            }
            if answered:
                kind = "yes/no" if item.answer in ("yes", "no") else "other"
                row |= {"multiple_choice_answer": item.answer, "answers": answers, "answer_type": kind}
            out.append(row)
        return out

    splits = {"validation": rows(items_of("VQAv2"), True), "test": rows(items_of("VQAv2-test"), False)}
    return {"default": Config(_VQAV2, splits)}


def gqa() -> dict[str, Config]:
    """Questions and images in two configurations, joined by the task."""
    items = items_of("GQA")
    questions = [
        {
            "id": f"{item.number:08d}",
            "imageId": item.image_id,
            "question": item.question,
            "answer": item.answer,
            "fullAnswer": f"it is {item.answer}.",
            "isBalanced": True,
            "groups": {"global": None, "local": "shape"},
            "types": {"structural": "query", "semantic": "attr", "detailed": "shape"},
            "annotations": {"question": [], "answer": [], "fullAnswer": []},
            "semantic": [{"operation": "select", "argument": "shape", "dependencies": []}],
            "semanticStr": "select: shape",
        }
        for item in items
    ]
    images = {item.image_id: {"id": item.image_id, "image": _png(item)} for item in items}
    names = ("testdev_balanced_instructions", "testdev_balanced_images")
    return {
        names[0]: Config(_GQA, {"testdev": questions}, f"{names[0]}/"),
        names[1]: Config(
            {"id": "string", "image": "image"}, {"testdev": list(images.values())}, f"{names[1]}/"
        ),
    }


def vizwiz() -> dict[str, Config]:
    """Val with ten answers, test without any."""

    def rows(items: list[Item], split: str) -> list[Row]:
        return [
            {
                "question_id": f"VizWiz_{split}_{item.number:08d}",
                "image": _png(item),
                "question": item.question,
                "answers": list(item.answers) if split == "val" else None,
                "category": "other" if split == "val" else None,
            }
            for item in items
        ]

    schema = {
        "question_id": "string",
        "image": "image",
        "question": "string",
        "answers": STRINGS,
        "category": "string",
    }
    splits = {"val": rows(items_of("VizWiz"), "val"), "test": rows(items_of("VizWiz-test"), "test")}
    return {"default": Config(schema, splits)}


def textvqa() -> dict[str, Config]:
    """Validation with ten answers, test without any."""

    def rows(items: list[Item], split: str) -> list[Row]:
        return [
            {
                "image_id": item.image_id,
                "question_id": 34602 + item.number,
                "question": item.question,
                "question_tokens": item.question.rstrip("?").split(),
                "image": _png(item),
                "image_width": 64,
                "image_height": 64,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": list(item.answers) if split == "val" else [""] * 10,
                "image_classes": ["Shape"],
                "set_name": split,
                "ocr_tokens": item.answer.upper().split(),
            }
            for item in items
        ]

    splits = {"validation": rows(items_of("TextVQA"), "val"), "test": rows(items_of("TextVQA-test"), "test")}
    return {"default": Config(_TEXTVQA, splits)}


def pope() -> dict[str, Config]:
    """All questions in one split, and by category in the configuration "Full"."""
    rows = [
        {
            "id": str(item.number),
            "question_id": str(item.number + 1),
            "question": item.question,
            "answer": item.answer,
            "image_source": f"COCO_val2014_{int(item.image_id):012d}",
            "image": _png(item),
            "category": item.category,
        }
        for item in items_of("POPE")
    ]
    categories = ("adversarial", "popular", "random")
    full = {name: [row for row in rows if row["category"] == name] for name in categories}
    return {"default": Config(_POPE, {"test": rows}), "Full": Config(_POPE, full, "Full/")}


def mme() -> dict[str, Config]:
    """Two questions an image, one to be answered Yes and one No."""
    rows = [
        {
            "question_id": f"{item.category}/{item.image_id}.png",
            "image": _png(item),
            "question": f"{item.question} Please answer yes or no.",
            "answer": item.answer.capitalize(),
            "category": item.category,
        }
        for item in items_of("MME")
    ]
    schema = {
        "question_id": "string",
        "image": "image",
        "question": "string",
        "answer": "string",
        "category": "string",
    }
    return {"default": Config(schema, {"test": rows})}


def mmvet() -> dict[str, Config]:
    """Free answers, for a judge."""
    rows = [
        {
            "question_id": f"v1_{item.number}",
            "image": _png(item),
            "question": item.question,
            "answer": item.answer,
            "image_source": "easy-vqa",
            "capability": "rec",
        }
        for item in items_of("MM-Vet")
    ]
    schema = {
        "question_id": "string",
        "image": "image",
        "question": "string",
        "answer": "string",
        "image_source": "string",
        "capability": "string",
    }
    return {"default": Config(schema, {"test": rows})}


def llava_in_the_wild() -> dict[str, Config]:
    """Free answers in three categories, for a judge that compares them with a reference."""
    rows = [
        {
            "question_id": item.number,
            "question": item.question,
            "image": _png(item),
            "caption": f"a shape; {item.question} {item.answer}",
            "gpt_answer": f"It is {item.answer}.",
            "category": item.category,
            "image_id": f"{item.image_id}.png",
        }
        for item in items_of("LLaVA-Wild")
    ]
    schema = {
        "question_id": "int64",
        "question": "string",
        "image": "image",
        "caption": "string",
        "gpt_answer": "string",
        "category": "string",
        "image_id": "string",
    }
    return {"default": Config(schema, {"train": rows})}
