"""The one engine behind both harness adapters: batched generation and exact scoring with token counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.answers import Answer, Score
from dynllava_plugin.evaluation.images import load_image
from dynllava_plugin.evaluation.requests import Generation, Request
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.model.prompts import IMAGE_TOKEN

DEFAULT_BATCH_SIZE = 8


class Engine:
    """A loaded model with its processor.

    Parameters
    ----------
    model : DynamicLlavaForConditionalGeneration
    processor : LlavaProcessor
    batch_size : int
        Samples in one forward pass. It never changes an answer.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is not a positive integer")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        eos = model.generation_config.eos_token_id
        eos = processor.tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = torch.tensor(eos if isinstance(eos, list) else [eos])

    @classmethod
    def load(cls, settings: ModelSettings, batch_size: int = DEFAULT_BATCH_SIZE) -> Engine:
        """Load what `settings` names."""
        from dynllava_plugin import load_model

        model, processor = load_model(
            settings.pretrained,
            device=settings.device,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            **settings.sparsity(),
        )
        return cls(model, processor, batch_size)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        generation: Generation | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answers in request order.

        Parameters
        ----------
        requests : sequence of Request
        generation : Generation, optional
            Greedy, at most 1,024 new tokens, where None.
        on_batch : callable, optional
            Told the number of samples after each batch, for a progress bar.

        Raises
        ------
        UserError
            For a request with a bad image, or with other than one image for each ``<image>``.
        """
        generation = generation or Generation.from_task(None)
        answers: list[Answer | None] = [None] * len(requests)
        for indices in self._batches(requests):
            batch = [requests[index] for index in indices]
            for index, answer in zip(indices, self._generate_batch(batch, generation), strict=True):
                answers[index] = answer
            if on_batch:
                on_batch(len(indices))
        return [answer for answer in answers if answer is not None]

    @torch.inference_mode()
    def score(
        self, requests: Sequence[Request], on_batch: Callable[[int], None] | None = None
    ) -> list[Score]:
        """Scores of each request's continuation, in request order, each in one parallel pass.

        Raises
        ------
        UserError
            As `generate`, and for an empty continuation.
        """
        scores: list[Score | None] = [None] * len(requests)
        for indices in self._batches(requests):
            batch = [requests[index] for index in indices]
            for index, score in zip(indices, self._score_batch(batch), strict=True):
                scores[index] = score
            if on_batch:
                on_batch(len(indices))
        return [score for score in scores if score is not None]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        # Longest first: padding is small, and the batch that needs the most memory comes first.
        order = sorted(
            range(len(requests)), key=lambda i: -len(requests[i].prompt) - len(requests[i].continuation)
        )
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _inputs(self, batch: Sequence[Request], texts: list[str]) -> dict[str, torch.Tensor]:
        images = []
        for request in batch:
            markers = request.prompt.count(IMAGE_TOKEN)
            if markers != len(request.images):
                found = f"{markers} {IMAGE_TOKEN} but {len(request.images)} images came with it"
                raise UserError(f"{request.name}: the prompt has {found}")
            images += [load_image(image, request.name) for image in request.images]
        inputs = self.processor(images=images or None, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _generate_batch(self, batch: Sequence[Request], generation: Generation) -> list[Answer]:
        inputs = self._inputs(batch, [request.prompt for request in batch])
        width = inputs["input_ids"].shape[1]
        pad = self.processor.tokenizer.pad_token_id
        output = self.model.generate(
            **inputs, **generation.kwargs, pad_token_id=pad, return_dict_in_generate=True
        )
        tokens = output.sequences[:, width:].cpu()  # [B, T]
        ended = torch.isin(tokens, self.eos_ids)
        # Tokens up to and with the first end token; all of them where none came.
        counts = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])  # [B]
        prompt_tokens = inputs["attention_mask"].sum(1).cpu()
        image_tokens = (inputs["input_ids"] == self.model.config.image_token_id).sum(1).cpu()
        texts = self.processor.tokenizer.batch_decode(
            [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)],
            skip_special_tokens=True,
        )
        one_history = generation.kwargs.get("num_beams", 1) == 1
        context = _context_counts(output.past_key_values) if one_history else None
        answers = []
        for row, text in enumerate(texts):
            count = int(counts[row])
            kept_image = cached = kept = None
            if context is not None:
                images_kept, output_keep = context
                kept_image = int(image_tokens[row] if images_kept is None else images_kept[row])
                # The last token is never fed back; what follows a sample's end token is padding of the batch.
                cached = count - 1
                kept = cached if output_keep is None else int(output_keep[row, :cached].sum())
            answers.append(
                Answer(
                    text=_truncate(text, generation.until),
                    prompt_tokens=int(prompt_tokens[row]),
                    image_tokens=int(image_tokens[row]),
                    kept_image_tokens=kept_image,
                    generated_tokens=count,
                    cached_tokens=cached,
                    kept_tokens=kept,
                )
            )
        return answers

    def _text_length(self, text: str) -> int:
        return len(self.processor.tokenizer(self.processor.prepare_text(text))["input_ids"])

    def _score_batch(self, batch: Sequence[Request]) -> list[Score]:
        texts, sizes = [], []
        for request in batch:
            texts.append(request.prompt + request.continuation)
            size = self._text_length(texts[-1]) - self._text_length(request.prompt)
            if size < 1:
                raise UserError(f"{request.name}: the text to score is empty")
            sizes.append(size)
        inputs = self._inputs(batch, texts)
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, size in enumerate(sizes):  # left padding: the continuation ends the row
            labels[row, -size:] = inputs["input_ids"][row, -size:]
        logprobs, greedy = self.model.score(**inputs, labels=labels, return_greedy=True)  # [B, L] each
        wanted = labels != -100
        totals = logprobs.double().sum(1).tolist()
        all_greedy = (greedy | ~wanted).all(1).tolist()
        return [
            Score(total, size, bool(hit)) for total, size, hit in zip(totals, sizes, all_greedy, strict=True)
        ]


def _truncate(text: str, until: tuple[str, ...]) -> str:
    text = text.strip()
    ends = [position for position in (text.find(stop) for stop in until) if position >= 0]
    return text[: min(ends)].strip() if ends else text


def _context_counts(cache: Any) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """From the cache: image tokens kept, int64 [B], and output tokens kept, bool [B, T] (None: all)."""
    if cache is None or not hasattr(cache, "kept_lengths"):
        return None
    images, output = cache.images_kept, cache.output_keep()
    return None if images is None else images.cpu(), None if output is None else output.cpu()
