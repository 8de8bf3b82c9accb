"""The one engine behind both harness adapters: batched generation and exact scoring with token counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.answers import Answer, Score
from dynllava_plugin.evaluation.costs import CachedDecoder, OutputCost, output_cost
from dynllava_plugin.evaluation.features import ImageFeatures
from dynllava_plugin.evaluation.histories import read_histories
from dynllava_plugin.evaluation.prefetch import Preparation, Prepared
from dynllava_plugin.evaluation.requests import Generation, Request
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.model.prompts import IMAGE_TOKEN
from dynllava_plugin.policies import Policy

DEFAULT_BATCH_SIZE = 8
# A window is sorted by length and by image, decoded while the one before it is answered.
_WINDOW_BATCHES, _WINDOW = 16, 256
Result = TypeVar("Result", Answer, Score)


class Engine:
    """A loaded model with its processor.

    Parameters
    ----------
    model : DynamicLlavaForConditionalGeneration
    processor : DynamicLlavaProcessor
    batch_size : int
        Samples in one forward pass. It never changes an answer.

    Attributes
    ----------
    seconds, model_seconds : float
        In `generate` and `score` so far, and of those inside the model.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is not a positive integer")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.features = ImageFeatures(model)
        self.decoder = CachedDecoder.of(model)
        self.seconds = self.model_seconds = 0.0
        eos = model.generation_config.eos_token_id
        eos = processor.tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = torch.tensor(eos if isinstance(eos, list) else [eos])

    @classmethod
    def load(cls, settings: ModelSettings, batch_size: int = DEFAULT_BATCH_SIZE) -> Engine:
        """Load what `settings` names."""
        from dynllava_plugin import load_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                0
            )  # predictors that a checkpoint lacks: the same in every process and resumed run
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
        on_batch: Callable[[list[int], list[Answer]], None] | None = None,
    ) -> list[Answer]:
        """Answers in request order.

        Parameters
        ----------
        requests : sequence of Request
            May build an item when it is indexed: that is done in the background, a window ahead.
        generation : Generation, optional
            Greedy, at most 1,024 new tokens, where None.
        on_batch : callable, optional
            Told the places in `requests` and the answers after each batch.

        Raises
        ------
        UserError
            For a request with a bad image, or with other than one image for each ``<image>``.
        """
        generation = generation or Generation.from_task(None)
        return self._all(requests, lambda batch: self._generate_batch(batch, generation), on_batch)

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[Request],
        on_batch: Callable[[list[int], list[Score]], None] | None = None,
    ) -> list[Score]:
        """Scores of each request's continuation, and of its earlier answers, in request order.

        One parallel pass a batch. Where a request has earlier answers, each is a round of its score.

        Raises
        ------
        UserError
            As `generate`, and for an empty continuation.
        """
        return self._all(requests, self._score_batch, on_batch)

    def _all(
        self,
        requests: Sequence[Request],
        work: Callable[[list[Prepared]], list[Result]],
        on_batch: Callable[[list[int], list[Result]], None] | None,
    ) -> list[Result]:
        started = time.perf_counter()
        results: list[Result | None] = [None] * len(requests)
        size = max(self.batch_size, min(_WINDOW_BATCHES * self.batch_size, _WINDOW))
        for window in Preparation(self.processor).windows(requests, size):
            for batch in self._batches(window):
                found = work(batch)
                for item, result in zip(batch, found, strict=True):
                    results[item.index] = result
                if on_batch:
                    on_batch([item.index for item in batch], found)
        self.seconds += time.perf_counter() - started
        return [result for result in results if result is not None]

    def _batches(self, window: list[Prepared]) -> Iterator[list[Prepared]]:
        """Questions about one image together, longest first: little padding, and the largest batch first."""
        groups: dict[tuple[bytes, ...], list[Prepared]] = {}
        for item in sorted(window, key=lambda item: -_length(item.request)):
            images = tuple(image.key for image in item.images) or (item.index.to_bytes(8, "big"),)
            groups.setdefault(images, []).append(item)
        order = [item for group in groups.values() for item in group]
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    @contextmanager
    def _model_time(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.model_seconds += time.perf_counter() - started

    def _inputs(self, batch: list[Prepared], texts: list[str]) -> tuple[dict[str, torch.Tensor], Any]:
        """`input_ids` and `attention_mask` [B, L], padded on the left, and the images' features."""
        with self._model_time():
            features = self.features.of([image for item in batch for image in item.images])
        if features is not None:
            tokens = features["image"].pooler_output.shape[1]
            texts = [
                self.processor.prepare_text(text).replace(IMAGE_TOKEN, IMAGE_TOKEN * tokens) for text in texts
            ]
        else:
            texts = [self.processor.prepare_text(text) for text in texts]
        inputs = self.processor.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}, features

    def _token_count(self, text: str) -> int:
        return len(self.processor.tokenizer(self.processor.prepare_text(text))["input_ids"])

    def _columns(self, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Character spans as token spans, counted from the end (negative; 0 is the end itself).

        Counted from the end because images, which stand before them, become many tokens, and padding is left.
        """
        total = self._token_count(text)
        return [(self._token_count(text[:s]) - total, self._token_count(text[:e]) - total) for s, e in spans]

    @property
    def _policy(self) -> Policy:
        return self.model.model.language_model.policy

    def _cost(self, dense: int, sparse: int, keep: list[bool]) -> OutputCost | None:
        """As `output_cost`; None under a policy whose cache isn't split at one layer for good."""
        if self._policy.sequential or self._policy.at_input:
            return None
        return output_cost(replace(self.decoder, sparse_layer=self._policy.gate_layer), dense, sparse, keep)

    def _earlier_answers(self, ids: torch.Tensor, batch: list[Prepared]) -> torch.Tensor | None:
        """bool [B, L] of the prompts' own output text; None where no prompt has any."""
        if not any(item.request.output_spans for item in batch):
            return None
        mask, width = torch.zeros_like(ids, dtype=torch.bool), ids.shape[1]
        for row, item in enumerate(batch):
            for start, end in self._columns(item.request.prompt, item.request.output_spans):
                mask[row, width + start : width + end] = True
        return mask

    def _generate_batch(self, batch: list[Prepared], generation: Generation) -> list[Answer]:
        inputs, features = self._inputs(batch, [item.request.prompt for item in batch])
        ids, width = inputs["input_ids"], inputs["input_ids"].shape[1]
        earlier = self._earlier_answers(ids, batch)
        more = {} if earlier is None else {"output_mask": earlier}
        with self._model_time():
            output = self.model.generate(
                **inputs,
                **generation.kwargs,
                **more,
                mm_encoder_outputs=features or {},
                pad_token_id=self.processor.tokenizer.pad_token_id,
                return_dict_in_generate=True,
            )
        tokens = output.sequences[:, width:].cpu()  # [B, T]
        ended = torch.isin(tokens, self.eos_ids)
        # Tokens up to and with the first end token; all of them where none came.
        counts = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])  # [B]
        prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        image_tokens = (ids == self.model.config.image_token_id).sum(1).tolist()
        texts = self.processor.tokenizer.batch_decode(
            [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)],
            skip_special_tokens=True,
        )
        one_history = generation.kwargs.get("num_beams", 1) == 1
        steps = tokens.shape[1] - 1  # the last token is never fed back
        histories = read_histories(output.past_key_values, steps, earlier) if one_history else None
        answers = []
        for row, text in enumerate(texts):
            count = int(counts[row])
            kept_image = cached = kept = cost = None
            if self._policy.sequential:
                # Its cache lets tokens go, prompt and output alike: lengths don't tell what came in.
                noted = output.past_key_values.images_kept if histories is not None else None
                kept_image = image_tokens[row] if noted is None else int(noted[row])
            elif histories is not None:
                cached = count - 1
                history = histories[row]
                keep = history.keep[:cached]  # the rest is padding of the batch behind the sample's end
                kept = sum(keep)
                dropped_image = prompt_tokens[row] - history.context - history.dropped_answers
                kept_image = image_tokens[row] - dropped_image
                cost = self._cost(prompt_tokens[row], history.context, keep)
            answers.append(
                Answer(
                    text=_truncate(text, generation.until),
                    prompt_tokens=prompt_tokens[row],
                    image_tokens=image_tokens[row],
                    kept_image_tokens=kept_image,
                    generated_tokens=count,
                    cached_tokens=cached,
                    kept_tokens=kept,
                    cost=cost,
                )
            )
        return answers

    def _score_batch(self, batch: list[Prepared]) -> list[Score]:
        texts, spans = [], []
        for item in batch:
            request = item.request
            texts.append(request.prompt + request.continuation)
            ends = (*request.output_spans, (len(request.prompt), len(texts[-1])))
            spans.append(self._columns(texts[-1], ends))
            if any(start == end for start, end in spans[-1]):
                raise UserError(f"{request.name}: the text to score is empty")
        inputs, features = self._inputs(batch, texts)
        ids, width = inputs["input_ids"], inputs["input_ids"].shape[1]
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        for row, columns in enumerate(spans):
            for start, end in columns:
                wanted[row, width + start : width + end] = True
        labels = ids.masked_fill(~wanted, -100)
        with self._model_time():
            found = self.model.score_details(
                **inputs, labels=labels, output_mask=wanted, mm_encoder_outputs=features
            )
        logprobs, greedy = found.log_probs.double().cpu(), (found.greedy | ~wanted).cpu()
        keep, wanted = found.text_keep.cpu(), wanted.cpu()
        prompt = inputs["attention_mask"].cpu()
        image = (ids == self.model.config.image_token_id).cpu()
        kept_images = found.image_keep.sum(1).tolist() if found.image_keep is not None else None
        scores = []
        for row, columns in enumerate(spans):
            dropped = int(image[row].sum()) - kept_images[row] if kept_images is not None else 0
            rounds = []
            for start, end in columns:
                place = slice(width + start, width + end)
                before = slice(0, width + start)
                dense = int(prompt[row, before].sum())
                lost = int((wanted[row, before] & ~keep[row, before]).sum())
                stays = keep[row, place].tolist()
                rounds.append(
                    Score(
                        logprob=float(logprobs[row, place].sum()),
                        tokens=end - start,
                        is_greedy=bool(greedy[row, place].all()),
                        kept_tokens=sum(stays),
                        cost=self._cost(dense, dense - dropped - lost, stays),
                    )
                )
            scores.append(rounds[0] if len(rounds) == 1 else _joined(rounds))
        return scores


def _length(request: Request) -> int:
    return len(request.prompt) + len(request.continuation)


def _joined(rounds: list[Score]) -> Score:
    """A conversation's score from its rounds'."""
    costs = [score.cost for score in rounds if score.cost is not None]
    return Score(
        logprob=sum(score.logprob for score in rounds),
        tokens=sum(score.tokens for score in rounds),
        is_greedy=all(score.is_greedy for score in rounds),
        kept_tokens=sum(score.kept_tokens for score in rounds),
        cost=sum(costs[1:], costs[0]) if costs else None,
        rounds=tuple(rounds),
    )


def _truncate(text: str, until: tuple[str, ...]) -> str:
    text = text.strip()
    ends = [position for position in (text.find(stop) for stop in until) if position >= 0]
    return text[: min(ends)].strip() if ends else text
