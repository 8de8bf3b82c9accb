"""Requests answered together get what each would get alone: limits, stop texts, policies, images of any size, one who leaves."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dynllava_plugin import load_model

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from dynllava_plugin.evaluation.engine.encoding import padded_on_the_left
from dynllava_plugin.serve.batches import Answer, Batches, Fault
from dynllava_plugin.serve.request import tensors
from tests.families.checkpoints import write_checkpoint

QUESTIONS = ("What is this?", "Describe the image in detail, please.", "Is the shape red or blue?", "Go on.")


class Asked:
    """A request, and what came back."""

    def __init__(self, inputs: Any, config: Any, **more: Any) -> None:
        self.inputs, self.config, self.more = inputs, config, more
        self.done, self.error = threading.Event(), None
        feed: Callable[[int], bool] = more.pop("feed", lambda token: False)
        self.answer = Answer(inputs, config, more.get("policy"), more.get("seed"), feed, self._end)

    def _end(self, error: Fault | None) -> None:
        self.error = error
        self.done.set()


def together(batches: Batches, asked: Sequence[Asked]) -> list[list[int]]:
    """Each answer's tokens, of requests that were all there when the first was taken."""
    with batches._changed:
        for one in asked:
            batches.submit(one.answer)
    for one in asked:
        assert one.done.wait(60)
    return [one.answer.tokens for one in asked]


def alone(model: Any, one: Asked) -> list[int]:
    """What `generate` gives for one request, its own length asked for, without the server's code."""
    found = model.generate(**one.inputs, generation_config=one.config, policy=one.more.get("policy"))
    return found[0, one.inputs["input_ids"].shape[1] :].tolist()


class Counted(Batches):
    """How many prompts each call of `generate` had."""

    def __init__(self, *args: Any) -> None:
        self.sizes: list[int] = []
        super().__init__(*args)

    def _generate(self, answers: Sequence[Answer]) -> None:
        self.sizes.append(len(answers))
        super()._generate(answers)


def settings(model: Any, new: int, **more: Any) -> Any:
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=new, do_sample=False, **more)
    return config


def prompt(processor: Any, model: Any, text: str, *sizes: tuple[int, int]) -> Any:
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in sizes]
    content = [{"type": "image", "image": picture} for picture in pictures]
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return tensors(turns, processor, None, {}).to(model.device, dtype=model.dtype)


@pytest.mark.parametrize("family", ["tiny", "llava_next", "qwen2_5_vl"])
def test_together_as_alone(family: str, tmp_path: Path) -> None:
    """Images of several sizes and none, answers of several lengths, an end token among them: two policies, two calls."""
    name = family if family == "tiny" else str(write_checkpoint(family, tmp_path / family))
    model, processor = load_model(name, device="cpu", policy="full")
    asked = []
    for number, text in enumerate(QUESTIONS):
        shown = [(56 + 40 * number, 96)] * (number % 3)
        inputs = prompt(processor, model, text, *shown)
        asked += [
            Asked(inputs, settings(model, 3 + 4 * number), policy=policy)
            for policy in (None, "fastv,k=2,r=0.5")
        ]
    # Random weights seldom end an answer: one token of the first answer is the end of all.
    first = alone(model, asked[-1])
    for one in asked:
        one.config.repetition_penalty = 1.3
        one.config.eos_token_id = [first[len(first) // 2]]
    batches = Counted(model, 8)
    assert together(batches, asked) == [alone(model, one) for one in asked]
    assert batches.sizes == [4, 4] and not any(one.error for one in asked)


def tiny() -> tuple[Any, Any]:
    return load_model("tiny", device="cpu", policy="full")


def test_a_stop_and_a_client_that_leaves_end_their_own_row() -> None:
    model, processor = tiny()
    inputs = [prompt(processor, model, text, (64, 64)) for text in QUESTIONS]
    whole = [alone(model, Asked(one, settings(model, 12, eos_token_id=-1))) for one in inputs]
    seen = []
    asked = [
        Asked(inputs[0], settings(model, 12, eos_token_id=-1), feed=lambda token: len(seen.append(token) or seen) == 5),
        Asked(inputs[1], settings(model, 12, eos_token_id=-1)),
        Asked(inputs[2], settings(model, 12, eos_token_id=-1)),
    ]  # fmt: skip
    leaving = asked[1].answer
    asked[2].answer._feed = lambda token: len(asked[2].answer.tokens) == 3 and leaving.left.set()  # type: ignore[func-returns-value]
    found = together(Batches(model, 8), asked)
    assert found[0] == whole[0][:5] == seen and found[2] == whole[2]
    assert whole[1][:3] == found[1][:3] and len(found[1]) == 3


def test_what_goes_together() -> None:
    """Up to the limit, in the order they came; not a seeded draw, nor another length under a setting that reads the prompt."""
    model, processor = tiny()
    inputs = [prompt(processor, model, text) for text in ("What is this?", "And what, please, is that?")]

    def sizes(most: int, *asked: Asked) -> list[int]:
        batches = Counted(model, most)
        together(batches, asked)
        return batches.sizes

    plain = [Asked(inputs[n % 2], settings(model, 2)) for n in range(5)]
    assert sizes(2, *plain) == [2, 2, 1]
    drawn = [Asked(inputs[0], settings(model, 2), seed=seed) for seed in (1, None)]
    assert sizes(8, *drawn) == [2]  # a seed that nothing is drawn with
    for one in drawn:
        one.config.do_sample = True
    drawn = [Asked(one.inputs, one.config, **one.more) for one in drawn]
    assert sizes(8, *drawn) == [1, 1]
    penalised = [Asked(inputs[n], settings(model, 2, no_repeat_ngram_size=3)) for n in (0, 1, 0)]
    assert sizes(8, *penalised) == [2, 1]


def test_padding_adds_no_token_to_a_prompt() -> None:
    """A repetition penalty reads the row; an image's place in the padding would be an image too many."""
    rows = [[1, 5, 9, 9, 7], [9, 9], [3, 9], [4]]
    found = padded_on_the_left(rows, 9, torch.device("cpu"))
    for row, ids, mask in zip(
        rows, found["input_ids"].tolist(), found["attention_mask"].tolist(), strict=True
    ):
        assert ids[-len(row) :] == row and mask == [0] * (5 - len(row)) + [1] * len(row)
        assert set(ids) == set(row) or set(row) == {9}
        assert 9 not in ids[: -len(row)]


def test_memory_that_ends_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four requests fit; a fault that isn't memory's ends its batch, one line each, and the thread goes on."""
    model, processor = tiny()
    asked = [Asked(prompt(processor, model, text), settings(model, 4)) for text in QUESTIONS]
    wanted = [alone(model, one) for one in asked]
    real, tried = model.generate, []

    def generate(**given: Any) -> Any:
        tried.append(len(given["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if tried[-1] == 1:
            raise ValueError("a broken\nrow")
        return real(**given)

    monkeypatch.setattr(model, "generate", generate)
    batches = Batches(model, 8)
    assert together(batches, asked) == wanted and tried == [4, 2, 2]
    broken = Asked(asked[0].inputs, asked[0].config)
    assert together(batches, [broken]) == [[]] and broken.error == (500, "a broken row")
    again = [Asked(one.inputs, one.config) for one in asked[:2]]
    assert together(batches, again) == wanted[:2]
