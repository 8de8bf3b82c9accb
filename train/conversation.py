"""A conversation as token ids and labels: vicuna_v1, answers (with their `</s>`) labelled, nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.llava_json import Sample
from dynllava_plugin.model.prompts import ANSWER_END, vicuna_v1

IGNORE = -100
ANSWER = " ASSISTANT: "  # what LLaVA splits a round at


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
        self.processor, self.tokenizer = processor, without_pad(tokenizer)
        self.prepare_text = processor.prepare_text
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image

    def __call__(self, sample: Sample) -> Tokens:
        """Tokenise one sample; without any label where its text is what LLaVA can't split into rounds.

        Raises
        ------
        UserError
            A token spans the border between a question and its answer.
        """
        text, spans = answer_spans(sample, self.prepare_text)
        plain = label_spans(self.tokenizer, text, spans, sample.name)
        if not splits_into_rounds(sample):
            plain = Tokens(plain.input_ids, [IGNORE] * len(plain.labels))
        images = plain.input_ids.count(self.image_token_id)
        if images != len(sample.images):
            raise UserError(f"{sample.name}: {images} image tokens for {len(sample.images)} images")
        input_ids: list[int] = []
        labels: list[int] = []
        for token, label in zip(plain.input_ids, plain.labels, strict=True):
            repeat = self.tokens_per_image if token == self.image_token_id else 1
            input_ids += [token] * repeat
            labels += [label] * repeat
        return Tokens(input_ids, labels)

    def encoded(
        self, sample: Sample, images: Sequence[Image.Image]
    ) -> tuple[Tokens, dict[str, torch.Tensor] | None]:
        """Return a sample's tokens, and ``{"pixel_values": float32 [images, 3, H, W]}`` (None: it has no image)."""
        tokens = self(sample)
        return tokens, self._pixels(images) if images else None

    def last_round(self, sample: Sample) -> tuple[str, str]:
        """Return the prompt for a sample's last answer, and that answer with the blank before it."""
        *earlier, (question, answer) = sample.turns
        return vicuna_v1([*earlier, (question, None)]), f" {answer.strip()}"

    def image_tokens(self, image: Image.Image) -> int:
        """Return how many tokens an image becomes: always as many."""
        return self.tokens_per_image

    def stand_in(self) -> dict[str, torch.Tensor]:
        """Return the inputs of one blank image."""
        return self._pixels([Image.new("RGB", (8, 8))])

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        prepared = [self.processor.prepare_image(image) for image in images]
        return {"pixel_values": self.processor.image_processor(prepared, return_tensors="pt")["pixel_values"]}


def splits_into_rounds(sample: Sample) -> bool:
    """Return whether LLaVA finds a conversation's rounds again; it learns nothing of one with `</s>` or ` ASSISTANT: ` in a turn."""
    *rounds, rest = vicuna_v1(sample.turns).split(ANSWER_END)
    return not rest and len(rounds) == len(sample.turns) and all(text.count(ANSWER) == 1 for text in rounds)


def without_pad(tokenizer: Any) -> Any:
    """Return a tokenizer to which `<pad>` in a text is text, as it is to LLaVA's; the same one where that can't be had."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    others = [token for token in content["added_tokens"] if token["content"] != tokenizer.pad_token]
    wanted = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    if tokenizer.pad_token in wanted or len(others) == len(content["added_tokens"]):
        return tokenizer
    built = Tokenizer.from_str(json.dumps({**content, "added_tokens": others}))
    if any(built.token_to_id(token["content"]) != token["id"] for token in others):
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain._tokenizer = built
    return plain


def label_spans(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], name: str, add_special_tokens: bool = True
) -> Tokens:
    """Return the text's tokens, labelled where their characters lie in one of `spans`.

    Raises
    ------
    UserError
        A token spans the border between a question and its answer; the message begins with `name`.
    """
    encoded = tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=add_special_tokens, verbose=False
    )
    labels: list[int] = []
    current = 0
    for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while current < len(spans) and begin >= spans[current][1]:
            current += 1
        start, stop = spans[current] if current < len(spans) else (len(text), len(text))
        if begin < start < end or (start <= begin and end > stop):
            raise UserError(f"{name}: the tokenizer merges {text[begin:end]!r} across an answer's border")
        labels.append(token if begin >= start and current < len(spans) else IGNORE)
    return Tokens(encoded["input_ids"], labels)


def answer_spans(
    sample: Sample, prepare_text: Callable[[str], str] = str
) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation as text, and where each answer (blank before it, `</s>` after it) begins and ends.

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
