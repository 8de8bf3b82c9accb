"""A conversation as token ids and labels under a checkpoint's own chat template: every family but LLaVA-1.5's vicuna_v1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from PIL import Image

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.evaluation.engine.prompting import ChatTemplate
from dynllava_plugin.evaluation.llava_json import Sample
from dynllava_plugin.model.prompts import IMAGE_TOKEN
from train.conversation import IGNORE, Tokens, label_spans
from train.skipped import UNREADABLE, UnusableSample

# What stands for an answer while the template is rendered, so that no template looks into one.
STAND_IN = "answer{}dynllava"
# Of a processor's output: what is no image.
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


class ChatEncoder:
    """Turns samples into token ids, labels and image inputs.

    Each answer stands right behind what the template writes as a prompt for it (`add_generation_prompt`), and is labelled
    with the special token that the template ends it with, or where it has none with the tokenizer's end of sequence, which
    then stands in place of what the template writes there.

    Parameters
    ----------
    processor : ProcessorMixin
        A family's own, with a chat template and a fast tokenizer.

    Raises
    ------
    UserError
        A slow tokenizer, or a template that doesn't render an answer.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        if not self.tokenizer.is_fast:
            raise UserError(
                f"--model_name_or_path: training needs a fast tokenizer, not {type(self.tokenizer).__name__}"
            )
        self.style = ChatTemplate(processor)
        self.image_token = processor.image_token
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(self.image_token)
        prompt, whole = self._render([("question", None)]), self._render([("question", STAND_IN)])
        before, found, self.tail = whole.partition(STAND_IN)
        if not found:
            raise UserError("--model_name_or_path: its chat template doesn't render an assistant's answer")
        # OneVision's ends "assistant\n" to be answered and writes "assistant \n" before an answer that is there.
        pairs = zip(prompt, before, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.header, self.written = prompt[common:], before[common:]
        # What the model itself says before an answer: a blank in LLaVA-NeXT's.
        self.lead = self.written if not self.header else ""
        self.end, self.rest = self._end_of_turn()
        bos = self.tokenizer.bos_token
        self.adds_special_tokens = not (bos and prompt.startswith(bos))

    def encoded(
        self, sample: Sample, images: Sequence[Image.Image]
    ) -> tuple[Tokens, dict[str, torch.Tensor] | None]:
        """Return a sample's tokens, image places expanded, and what the processor makes of its images (None: it has none).

        Raises
        ------
        UserError
            A token spans an answer's border, or a placeholder stands in the text.
        UnusableSample
            An image that the processor refuses.
        """
        text, spans = self.text(sample)
        if text.count(self.image_token) != len(sample.images):
            raise UserError(
                f"{sample.name}: {text.count(self.image_token)} {self.image_token} for {len(sample.images)} images; "
                "take that word out of its text"
            )
        plain = label_spans(self.tokenizer, text, spans, sample.name, self.adds_special_tokens)
        if any(self.end.strip() in part for turn in sample.turns for part in turn):
            plain = Tokens(plain.input_ids, [IGNORE] * len(plain.labels))  # as LLaVA does with its own
        if not images:
            return plain, None
        inputs = self._process(text, images, sample.name)
        ids = inputs["input_ids"][0].tolist()
        labels = self._expanded(plain, ids, sample.name)
        return Tokens(ids, labels), {name: inputs[name] for name in inputs if name not in TEXT_INPUTS}

    def text(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation as text, an image a placeholder, and where each answer with its end stands."""
        turns = [(question, STAND_IN.format(place)) for place, (question, _) in enumerate(sample.turns)]
        left, text, spans = self._render(turns, sample.name), "", []
        for place, (_, answer) in enumerate(sample.turns):
            once = left.count(turns[place][1]) == 1
            head, _, left = left.partition(turns[place][1])
            known = not place or head.startswith(self.tail)
            if not once or not known or not head.endswith(self.written):
                raise UserError(f"{sample.name}: the checkpoint's chat template renders it in another order")
            text += head[len(self.tail) if place else 0 : len(head) - len(self.written)] + self.header
            start = len(text)
            text += self.lead + answer.strip() + self.end
            spans.append((start, len(text)))
            text += self.rest
        return text, spans

    def last_round(self, sample: Sample) -> tuple[str, str]:
        """Return the prompt for a sample's last answer, an image a placeholder, and that answer as it stands behind."""
        text, spans = self.text(sample)
        return text[: spans[-1][0]], self.lead + sample.turns[-1][1].strip()

    def image_tokens(self, image: Image.Image) -> int:
        """Return how many tokens an image becomes."""
        ids = self._process(self.image_token, [image], "image")["input_ids"]
        return int((ids == self.image_token_id).sum())

    def stand_in(self) -> dict[str, torch.Tensor]:
        """Return the inputs of one blank image."""
        inputs = self._process(self.image_token, [Image.new("RGB", (32, 32))], "image")
        return {name: inputs[name] for name in inputs if name not in TEXT_INPUTS}

    def _render(self, turns: Sequence[tuple[str, str | None]], name: str = "--model_name_or_path") -> str:
        """The turns as evaluation writes them, a prompt where the last has no answer."""
        return self.style.prompt(turns, sum(question.count(IMAGE_TOKEN) for question, _ in turns), name)

    def _end_of_turn(self) -> tuple[str, str]:
        """What ends an answer, up to a special token, and what the template writes behind it before the next question."""
        special = [
            str(token)
            for token in self.tokenizer.added_tokens_decoder.values()
            if getattr(token, "special", False)
        ]
        blank = self.tail[: len(self.tail) - len(self.tail.lstrip())]
        for token in sorted(special, key=len, reverse=True):
            if self.tail.startswith(blank + token):
                return blank + token, self.tail[len(blank + token) :]
        return self.tokenizer.eos_token, ""

    def _process(self, text: str, images: Sequence[Image.Image], name: str) -> Any:
        try:
            return self.processor(
                text=[text],
                images=[list(images)],
                return_tensors="pt",
                add_special_tokens=self.adds_special_tokens,
            )
        except Exception as error:  # each processor has its own for a picture of odd proportions
            raise UnusableSample(
                UNREADABLE, f"{name}: the processor refuses its images ({one_line(error)})"
            ) from None

    def _expanded(self, plain: Tokens, ids: list[int], name: str) -> list[int]:
        """Labels of `ids`, which are `plain`'s with more in the place of each image."""
        labels, place = [IGNORE] * len(ids), 0
        borders = [at for at, token in enumerate(plain.input_ids) if token == self.image_token_id]
        for start, end in zip([-1, *borders], [*borders, len(plain.input_ids)], strict=True):
            part = slice(start + 1, end)
            tokens, wanted = plain.input_ids[part], plain.labels[part]
            last = len(ids) - len(tokens)
            first = last if end == len(plain.input_ids) else place
            found = next((at for at in range(first, last + 1) if ids[at : at + len(tokens)] == tokens), None)
            if found is None:
                raise UserError(f"{name}: its text has other tokens beside its images than without them")
            place = found + len(tokens)
            labels[found:place] = wanted
        return labels
