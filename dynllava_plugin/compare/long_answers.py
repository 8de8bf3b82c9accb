"""What the KV cache holds after a long answer, the same reference answer for every policy."""

from __future__ import annotations

from typing import Any

import torch

from dynllava_plugin.compare.answers import model_inputs
from dynllava_plugin.compare.costs import cache_bytes
from dynllava_plugin.evaluation.engine.requests import Request
from dynllava_plugin.evaluation.own_sets import easy_vqa

SAMPLES = 16
BENCHMARK = "easy_vqa_describe"


def reference_cache_kib(engine: Any, limit: int | None) -> float:
    """Mean KiB of a sample, over at most `SAMPLES` descriptions fed token by token."""
    rows = easy_vqa.load_rows(BENCHMARK)[: min(limit or SAMPLES, SAMPLES)]
    prompts, answers = [], []
    tokenizer = engine.processor.tokenizer
    for row in rows:
        prompt = engine.style.prompt([(row["question"], None)], 1, row["id"])
        prompts.append(Request(prompt, (row["image"],), row["id"]))
        size = len(_ids(engine, prompt))
        answers.append(_ids(engine, f"{prompt} {row['answer']}")[size:])
    inputs = model_inputs(engine, prompts)
    width = max(len(answer) for answer in answers)
    padded = [answer + [tokenizer.pad_token_id] * (width - len(answer)) for answer in answers]
    mask = [[1] * len(answer) + [0] * (width - len(answer)) for answer in answers]
    device = engine.model.device
    return (
        cache_bytes(
            engine.model, inputs, torch.tensor(padded, device=device), torch.tensor(mask, device=device)
        )
        / 1024
    )


def _ids(engine: Any, text: str) -> list[int]:
    return engine.processor.tokenizer(engine.processor.prepare_text(text))["input_ids"]
