"""A harness's question and images as LLaVA-1.5's prompt."""

from __future__ import annotations

from collections.abc import Sequence

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import IMAGE_TOKEN, vicuna_v1, with_images


def conversation_prompt(turns: Sequence[tuple[str, str | None]], images: int, name: str) -> str:
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
    for question, _ in turns:
        if not question.replace(IMAGE_TOKEN, "").strip():
            raise UserError(f"{name}: the question is empty")
    markers = sum(question.count(IMAGE_TOKEN) for question, _ in turns)
    if markers == 0 and images:
        (first, answer), *rest = turns
        turns = [(with_images(first, images), answer), *rest]
    elif markers != images:
        raise UserError(f"{name}: the question has {markers} {IMAGE_TOKEN} but {images} images came with it")
    return vicuna_v1(turns)
