"""A harness's question, or conversation, and its images as the model's prompt: LLaVA-1.5's, or the checkpoint's chat template's."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.evaluation.engine.requests import Request
from dynllava_plugin.model.prompts import ASSISTANT, IMAGE_TOKEN, USER, vicuna_v1, with_images
from dynllava_plugin.videos import is_video

Turn = tuple[str, str | None]
_VIDEO = "<video\0>"  # in a question, where a video goes: nobody writes that


def style_of(model: Any, processor: Any, system_prompt: str | None = None) -> PromptStyle:
    """Return how a loaded model is asked: LLaVA-1.5's vicuna as its evaluation does, any other by its own chat template.

    A LLaVA with another LLM than Vicuna's Llama, or a template that doesn't write Vicuna's turns, is any other.

    Parameters
    ----------
    model, processor
        As `load_model` gives them.
    system_prompt : str, optional
        For the chat template, in place of its own.

    Raises
    ------
    UserError
        A checkpoint without a chat template; a system prompt for vicuna, which has its own.
    """
    template = ChatTemplate(processor, system_prompt)
    kind = model.config.text_config.model_type
    if kind != "dynamic_llama" or template.has_videos or not template.writes_vicuna():
        return template
    if system_prompt is not None:
        raise UserError("system_prompt: LLaVA-1.5's prompt has its own; leave it out")
    return VICUNA


class PromptStyle(ABC):
    """Turns of a conversation as the text that a model is given; an image or a video is one token of its processor's."""

    has_videos = False

    def prompt(self, turns: Sequence[Turn], images: int, name: str) -> str:
        """Return the prompt; the images go before the first question where no question says where.

        Parameters
        ----------
        turns : sequence of (question, answer)
            ``<image>`` in a question says where an image goes. The last answer is None.
        images : int
            How many images come with it.
        name : str
            Task and sample, for error messages.

        Raises
        ------
        UserError
            For an empty question, markers that don't match the images, or turns that a chat template can't write.
        """
        return self._text(_marked(turns, images, name), name)

    def request(
        self, turns: Sequence[Turn], images: Sequence[str | Image.Image], name: str, continuation: str = ""
    ) -> Request:
        """Return the open round of a conversation, whose earlier answers are output text.

        Parameters
        ----------
        turns, name
            As in `prompt`.
        images : sequence of path or PIL image
            In the order of their markers; a path may be a video's.
        continuation : str
            The last answer, to be scored.

        Raises
        ------
        UserError
            As `prompt`.
        """
        marked = _marked(turns, len(images), name)
        videos = [is_video(image) for image in images]
        if any(videos):
            if not self.has_videos:
                raise UserError(
                    f"{name}: {images[videos.index(True)]} is a video, and the checkpoint reads images only"
                )
            marked = _with_videos(marked, videos)
        text = self._text(marked, name)
        spans = []
        for place, (question, answer) in enumerate(marked):
            if answer:
                asked = self._text([*marked[:place], (question, None)], name)
                spans.append(self._answer_span(asked, answer, text, name))
        continuation = continuation.strip()
        if continuation:
            continuation = self._lead(marked, continuation, text, name) + continuation
        return Request(text, tuple(images), name, continuation, tuple(spans))

    @abstractmethod
    def _text(self, turns: Sequence[Turn], name: str) -> str:
        """Return the text of turns that have their image markers."""

    @abstractmethod
    def _answer_span(self, asked: str, answer: str, text: str, name: str) -> tuple[int, int]:
        """Return where in `text` the answer stands whose prompt was `asked`, with what leads to its first token."""

    @abstractmethod
    def _lead(self, turns: Sequence[Turn], answer: str, text: str, name: str) -> str:
        """Return what stands between a prompt and its answer."""


class Vicuna(PromptStyle):
    """LLaVA-1.5's ``vicuna_v1``."""

    def _text(self, turns: Sequence[Turn], name: str) -> str:
        return vicuna_v1(turns)

    def _answer_span(self, asked: str, answer: str, text: str, name: str) -> tuple[int, int]:
        # vicuna_v1 puts one space between "ASSISTANT:" and the answer; it belongs to the first token.
        return len(asked), len(asked) + 1 + len(answer)

    def _lead(self, turns: Sequence[Turn], answer: str, text: str, name: str) -> str:
        return " "


VICUNA = Vicuna()


class ChatTemplate(PromptStyle):
    """A checkpoint's own chat template.

    Parameters
    ----------
    processor
        As `load_model` gives it.
    system_prompt : str, optional
        A system message before the first question; the template's own where None.

    Raises
    ------
    UserError
        A processor without a chat template.
    """

    def __init__(self, processor: Any, system_prompt: str | None = None) -> None:
        self._template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
        if self._template is None:
            raise UserError(
                "chat_template: the checkpoint has none (chat_template.jinja), so it can't be asked questions"
            )
        self._processor, self._system = processor, system_prompt
        self.has_videos = getattr(processor, "video_token", None) is not None

    def writes_vicuna(self) -> bool:
        """Whether the template writes Vicuna's turns, with or without its system sentence."""
        question = with_images("What is it?")
        text = self._text([(question, None)], "the first question")
        return text.endswith(f"{USER}: {question} {ASSISTANT}:")

    def _text(self, turns: Sequence[Turn], name: str) -> str:
        messages: list[dict[str, Any]] = []
        if self._system is not None:
            messages.append({"role": "system", "content": [{"type": "text", "text": self._system}]})
        for question, answer in turns:
            messages.append({"role": "user", "content": _content(question)})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        try:
            return self._processor.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=turns[-1][1] is None,
            )
        except Exception as error:  # what a template raises is its own
            raise UserError(
                f"{name}: the checkpoint's chat template can't write it ({one_line(error)})"
            ) from None

    def _answer_span(self, asked: str, answer: str, text: str, name: str) -> tuple[int, int]:
        # A template may write an answer's header another way than it asks for one ("assistant \n", "assistant\n").
        pairs = enumerate(zip(asked, text, strict=False))
        alike = next((at for at, (one, other) in pairs if one != other), len(asked))
        start = text.find(answer, alike)
        if start < 0:
            raise UserError(f"{name}: the checkpoint's chat template changes an answer ({answer[:40]!r})")
        gap = text[len(asked) : start]
        return (len(asked) if alike == len(asked) and not gap.strip() else start), start + len(answer)

    def _lead(self, turns: Sequence[Turn], answer: str, text: str, name: str) -> str:
        answered = self._text([*turns[:-1], (turns[-1][0], answer)], name)
        if not answered.startswith(text):
            return ""
        gap = answered[len(text) : max(answered.find(answer, len(text)), 0)]
        return "" if gap.strip() else gap


def _content(question: str) -> list[dict[str, str]]:
    """A question as the parts of a message; LLaVA's line break behind a marker goes with the marker."""
    first, *rest = re.split(f"({IMAGE_TOKEN}|{_VIDEO})", question)
    parts = [{"type": "text", "text": first}] if first else []
    for marker, text in zip(rest[::2], rest[1::2], strict=True):
        parts.append({"type": "video" if marker == _VIDEO else "image"})
        text = text.removeprefix("\n")
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _with_videos(turns: Sequence[Turn], videos: Sequence[bool]) -> list[Turn]:
    """The turns, whose image markers are a video's where `videos`, in their order, says so."""
    of_each = iter(videos)
    return [
        (re.sub(IMAGE_TOKEN, lambda _: _VIDEO if next(of_each) else IMAGE_TOKEN, question), answer)
        for question, answer in turns
    ]


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
