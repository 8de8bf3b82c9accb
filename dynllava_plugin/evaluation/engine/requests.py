"""What the engine is asked: a prompt with its images, and how to generate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

MAX_NEW_TOKENS = 1024
# What a task may tell `generate`. Harness-only keys (image_aspect_ratio, image_sizes, ...) are left out.
GENERATION_KEYS = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
SAMPLING_KEYS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Request:
    """A whole prompt, one image token of the model's processor for each image, and what follows.

    Attributes
    ----------
    name : str
        Task and sample, for error messages.
    continuation : str
        Text to score after the prompt; unused in generation.
    output_spans : tuple of (start, end)
        Characters of the prompt that are output text, in order: a conversation's earlier answers. Tokens of
        theirs that the model drops are no context for later rounds; when scoring they are scored as well.
    """

    prompt: str
    images: tuple[str | Image.Image, ...] = ()
    name: str = "request"
    continuation: str = ""
    output_spans: tuple[tuple[int, int], ...] = ()

    @property
    def scored_text(self) -> str:
        """Return the prompt and the text to score behind it."""
        return self.prompt + self.continuation


@dataclass
class Generation:
    """Arguments of one `generate` call.

    Attributes
    ----------
    kwargs : dict
        For `model.generate`.
    until : tuple of str
        The answer ends before the first of these.
    """

    kwargs: dict[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()

    @classmethod
    def from_task(cls, values: dict[str, Any] | None) -> Generation:
        """Return a task's generation kwargs as arguments of `generate`: greedy and 1,024 new tokens unless the task says otherwise."""
        values = dict(values or {})
        until = values.pop("until", None) or ()
        until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        if "max_gen_toks" in values:
            values.setdefault("max_new_tokens", values["max_gen_toks"])
        kwargs = {key: values[key] for key in GENERATION_KEYS if values.get(key) is not None}
        kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        # Sampling happens where it is asked for, not because a temperature is set; temperature 0 is greedy.
        sample = bool(kwargs.pop("do_sample", False)) and kwargs.get("temperature", 1.0) > 0
        if not sample:
            kwargs = {key: value for key, value in kwargs.items() if key not in SAMPLING_KEYS}
        return cls({"do_sample": sample, **kwargs}, until)
