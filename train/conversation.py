"""A conversation as token ids and labels: vicuna_v1, answers (with their `</s>`) labelled, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.prompts import ANSWER_END, vicuna_v1
from train.samples import Sample

IGNORE = -100


@dataclass(frozen=True)
class Tokens:
    """Token ids of a conversation, image markers expanded, and its labels (`IGNORE` outside the answers)."""

    input_ids: list[int]
    labels: list[int]


class ConversationEncoder:
    """Turns samples into token ids and labels.

    The whole conversation is tokenised as one string, as a prompt is at inference, and each token is labelled
    by where its characters lie: no arithmetic on lengths of separately tokenised pieces, which drifts.

    Parameters
    ----------
    processor : DynamicLlavaProcessor
        Its tokenizer must be a fast one (character offsets); its spacing rules apply as at inference.
    image_token_id : int
        The id an `<image>` marker becomes.
    tokens_per_image : int
        How often that id is repeated for each image.

    Raises
    ------
    UserError
        The tokenizer has no offsets, or its end of sequence is not vicuna_v1's `</s>`.
    """

    def __init__(self, processor: Any, image_token_id: int, tokens_per_image: int) -> None:
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise UserError(
                f"--model_name_or_path: training needs a fast tokenizer, not {type(tokenizer).__name__}"
            )
        if tokenizer.convert_tokens_to_ids(ANSWER_END) != tokenizer.eos_token_id:
            raise UserError(f"--model_name_or_path: the tokenizer's end of sequence is not {ANSWER_END!r}")
        self.tokenizer = tokenizer
        self.prepare_text = processor.prepare_text
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image

    def __call__(self, sample: Sample) -> Tokens:
        """Tokenise one sample.

        Raises
        ------
        UserError
            A token spans the border between a question and its answer.
        """
        text, spans = answer_spans(sample, self.prepare_text)
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        input_ids: list[int] = []
        labels: list[int] = []
        images, current = 0, 0
        for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            while current < len(spans) and begin >= spans[current][1]:
                current += 1
            start = spans[current][0] if current < len(spans) else len(text)
            if begin < start < end:
                raise UserError(
                    f"{sample.name}: the tokenizer merges {text[begin:end]!r} across an answer's border"
                )
            repeat = self.tokens_per_image if token == self.image_token_id else 1
            images += token == self.image_token_id
            input_ids += [token] * repeat
            labels += [token if begin >= start else IGNORE] * repeat
        if images != len(sample.images):
            raise UserError(f"{sample.name}: {images} image tokens for {len(sample.images)} images")
        return Tokens(input_ids, labels)


def answer_spans(
    sample: Sample, prepare_text: Callable[[str], str] = str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where each answer (blank before it, `</s>` after it) begins and ends.

    `prepare_text` is the processor's: what it does to a text it does alike to each beginning of that text.
    """
    turns: list[tuple[str, str | None]] = []
    spans = []
    text = ""
    for question, answer in sample.turns:
        start = len(prepare_text(vicuna_v1([*turns, (question, None)])))
        turns.append((question, answer))
        text = prepare_text(vicuna_v1(turns))
        spans.append((start, len(text)))
    return text, spans
