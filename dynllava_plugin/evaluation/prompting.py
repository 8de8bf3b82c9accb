"""A harness's question, or conversation, and its images as LLaVA-1.5's prompt."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.requests import Request
from dynllava_plugin.model.prompts import IMAGE_TOKEN, vicuna_v1, with_images

Turn = tuple[str, str | None]


def conversation_prompt(turns: Sequence[Turn], images: int, name: str) -> str:
    """vicuna_v1 prompt; the images' markers go before the first question where the text has none.

    Parameters
    ----------
    turns : sequence of (question, answer)
        The last answer is None.
    images : int
        How many images come with it.
    name : str
        Task and sample, for error messages.

    Raises
    ------
    UserError
        For an empty question, or markers that don't match the images.
    """
    return vicuna_v1(_marked(turns, images, name))


def conversation_request(
    turns: Sequence[Turn], images: Sequence[str | Image.Image], name: str, continuation: str = ""
) -> Request:
    """The open round of a conversation, whose earlier answers are output text.

    Parameters
    ----------
    turns : sequence of (question, answer)
        The last answer is None.
    images : sequence of paths or PIL images
    name : str
        Task and sample, for error messages.
    continuation : str
        The last answer, to be scored.

    Raises
    ------
    UserError
        As `conversation_prompt`.
    """
    marked = _marked(turns, len(images), name)
    spans = []
    for place, (question, answer) in enumerate(marked):
        if answer:
            # vicuna_v1 puts one space between "ASSISTANT:" and the answer; it belongs to the first token.
            start = len(vicuna_v1([*marked[:place], (question, None)]))
            spans.append((start, start + 1 + len(answer)))
    scored = f" {continuation.strip()}" if continuation.strip() else ""
    return Request(vicuna_v1(marked), tuple(images), name, scored, tuple(spans))


def _marked(turns: Sequence[Turn], images: int, name: str) -> list[Turn]:
    for question, _ in turns:
        if not question.replace(IMAGE_TOKEN, "").strip():
            raise UserError(f"{name}: the question is empty")
    markers = sum(question.count(IMAGE_TOKEN) for question, _ in turns)
    if markers == 0 and images:
        (first, answer), *rest = turns
        return [(with_images(first, images), answer), *rest]
    if markers != images:
        raise UserError(f"{name}: the question has {markers} {IMAGE_TOKEN} but {images} images came with it")
    return list(turns)
