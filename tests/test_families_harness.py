"""Every family in both harnesses, on tiny checkpoints as from its hub: the same answers as lmms-eval's own models."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation import easy_vqa
from dynllava_plugin.evaluation.lmms_eval_model import DynamicLlava
from dynllava_plugin.evaluation.records import RECORD
from dynllava_plugin.evaluation.vlmevalkit_model import DynamicLlava as KitModel
from dynllava_plugin.model.prompts import CHAT_TEMPLATE
from tests.families.checkpoints import FAMILIES, picture, write_checkpoint

LIMIT = 5
HELPFUL = "You are a helpful assistant."
every_family = pytest.mark.parametrize("family", FAMILIES)
# lmms-eval's own model of a family: its module, class and arguments, and what ours is given to be asked the same.
LLAVA_HF: Any = ("llava_hf", "LlavaHf", {}, {})
WRAPPERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llava_llama": LLAVA_HF,
    "llava_qwen2": LLAVA_HF,
    "llava_mistral": LLAVA_HF,
    "llava_next": LLAVA_HF,
    "llava_onevision": LLAVA_HF,
    # The pixels of the tiny processors, not the models' own limits; weights are rounded to bfloat16 whatever is asked.
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VL", {"min_pixels": 784, "max_pixels": 12544},
                   {"dtype": "bfloat16"}),
    "qwen3_vl": ("qwen3_vl", "Qwen3_VL", {"min_pixels": 1024, "max_pixels": 16384},
                 {"dtype": "bfloat16", "system_prompt": HELPFUL}),
    "internvl": ("internvl_hf", "InternVLHf", {"max_patches": 6}, {"dtype": "bfloat16"}),
}  # fmt: skip
# Sizes that need no resizing where the two resize otherwise: the original LLaVA-1.5's images are resized by PIL; lmms-eval's
# Qwen models resize an image once more, to multiples of 28 or 32 pixels a side and at least four of their squares.
SIZES = {
    "llava_llama": [(28, 28)],
    "llava_qwen2": [(28, 28)],
    "llava_mistral": [(28, 28)],
    "qwen2_5_vl": [(56, 84), (56, 56), (112, 84)],
    "qwen3_vl": [(64, 96), (64, 64), (96, 64)],
}
QUESTIONS = [
    "What color is the shape?", "Is there a red circle in the picture?", "Yes or no?", "How many shapes are there?\nAnswer:",
    "Which shape is on the left? Describe the picture in detail.",
]  # fmt: skip
ARGUMENTS = {"max_new_tokens": 12, "do_sample": False, "until": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint, written once."""
    written: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in written:
            written[family] = write_checkpoint(family, tmp_path_factory.mktemp(family))
        return written[family]

    return of


def documents(family: str) -> list[dict[str, Any]]:
    sizes = SIZES.get(family, [(28, 28), (84, 56), (28, 84)])
    return [
        {"image": picture(sizes[index % len(sizes)], index), "question": question}
        for index, question in enumerate(QUESTIONS)
    ]


def visuals(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"]]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def instances(arguments: Callable[[int], tuple[Any, ...]]) -> list[Instance]:
    metadata = {"task": "task", "repeats": 1}
    return [
        Instance(
            request_type="generate_until", arguments=arguments(i), idx=0, metadata={**metadata, "doc_id": i}
        )
        for i in range(LIMIT)
    ]


def our_answers(lm: DynamicLlava, docs: list[dict[str, Any]]) -> list[str]:
    lm.task_dict = {"task": {"test": docs}}
    asked = instances(lambda i: (docs[i]["question"], dict(ARGUMENTS), visuals, i, "task", "test"))
    return [result.text for result in lm.generate_until(asked)]


@pytest.mark.parametrize("family", WRAPPERS)
def test_full_context_answers_as_lmms_evals_own_model(family: str, folder: Callable[[str], Path]) -> None:
    module, name, theirs, ours = WRAPPERS[family]
    path, docs = folder(family), documents(family)
    if (
        family == "llava_llama"
    ):  # asked as LLaVA-1.5's evaluation does, which the hub's template leaves a sentence out of
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    stock = getattr(importlib.import_module(f"lmms_eval.models.chat.{module}"), name)
    wrapper = stock(pretrained=str(path), device="cpu", device_map="cpu", **theirs)
    wrapper.model.float()  # bfloat16 weights; sums in float32, which no order of adding changes
    wrapper.task_dict = {"task": {"test": docs}}
    with torch.no_grad():
        found = wrapper.generate_until(
            instances(lambda i: (docs[i]["question"], messages, dict(ARGUMENTS), i, "task", "test"))
        )
    lm = DynamicLlava(batch_size="2", device="cpu", pretrained=str(path), mode="full", **ours)
    lm.engine.model.float()
    wanted = [result.text.strip() for result in found]
    assert our_answers(lm, docs) == wanted
    assert len(set(wanted)) > 1 and all(wanted)
