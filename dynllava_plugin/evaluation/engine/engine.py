"""The one engine behind both harness adapters: batched generation and exact scoring with token counts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from dynllava_plugin.environment import free_bytes
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answering import Calls, answer_batch
from dynllava_plugin.evaluation.engine.answers import Answer, Score
from dynllava_plugin.evaluation.engine.encoding import Prepared, encoder_of, limit_pixels
from dynllava_plugin.evaluation.engine.prompting import style_of
from dynllava_plugin.evaluation.engine.requests import Generation, Request
from dynllava_plugin.evaluation.engine.scoring import score_batch
from dynllava_plugin.evaluation.settings import AUTO, ModelSettings
from dynllava_plugin.model.static_prefill import prefill_bytes

DEFAULT_BATCH_SIZE = 8
# The most that "auto" takes; what it counts on for a sample, where the model has room for so many; how much of the free memory.
_MOST, _SAMPLE_TOKENS, _SHARE = 64, 4096, 0.5
# A window is sorted by length and by image, decoded while the one before it is answered.
_WINDOW = 256
Result = TypeVar("Result", Answer, Score)


class Engine:
    """A loaded model with its processor.

    It runs without gradients, but not in PyTorch's inference mode: what ZeRO-3 gathers there couldn't be trained afterwards.

    Parameters
    ----------
    model, processor
        As `load_model` gives them, of any family.
    batch_size : int or "auto"
        Samples in one forward pass. In float32 it never changes an answer; half precision may round another way. "auto" takes
        as many as memory has room for, and fewer once a batch found none.
    system_prompt : str, optional
        As in `style_of`.
    video_frames : int, optional
        Of a video, that are looked at.

    Attributes
    ----------
    style : PromptStyle
        What makes requests of questions.
    encoder : Encoder
        What makes arguments of the model of requests.
    calls : Calls
        The model's, batch by batch.
    seconds : float
        In `generate` and `score` so far.
    started : float or None
        `time.perf_counter()` at the first question.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        system_prompt: str | None = None,
        video_frames: int | None = None,
    ) -> None:
        self._may_shrink = batch_size == AUTO
        size = largest_batch(model) if batch_size == AUTO else batch_size
        if type(size) is not int or size < 1:
            raise UserError(f"batch_size: {batch_size} is neither a positive integer nor {AUTO}")
        self.model, self.processor, self.batch_size = model, processor, size
        self.style, self.encoder = style_of(model, processor, system_prompt), encoder_of(model, processor)
        if video_frames is not None:
            self.encoder.look_at(video_frames)
        self.calls = Calls(model, processor, self.encoder)
        self.seconds = 0.0
        self.started: float | None = None

    @classmethod
    def load(cls, settings: ModelSettings, batch_size: int | str = DEFAULT_BATCH_SIZE) -> Engine:
        """Return an engine around what `settings` names."""
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
                quantization=settings.quantization,
                **settings.sparsity(),
            )
        limit_pixels(processor, settings.min_pixels, settings.max_pixels)
        return cls(model, processor, batch_size, settings.system_prompt, settings.video_frames)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        generation: Generation | None = None,
        on_batch: Callable[[list[int], list[Answer]], None] | None = None,
    ) -> list[Answer]:
        """Return answers in request order.

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
        return self._all(
            requests,
            attrgetter("prompt"),
            lambda batch: answer_batch(self.calls, batch, generation),
            on_batch,
        )

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[Request],
        on_batch: Callable[[list[int], list[Score]], None] | None = None,
    ) -> list[Score]:
        """Return scores of each request's continuation, and of its earlier answers, in request order.

        One parallel pass a batch. Where a request has earlier answers, each is a round of its score.

        Raises
        ------
        UserError
            As `generate`, and for an empty continuation.
        """
        return self._all(
            requests, attrgetter("scored_text"), lambda batch: score_batch(self.calls, batch), on_batch
        )

    def _all(
        self,
        requests: Sequence[Request],
        text_of: Callable[[Request], str],
        work: Callable[[list[Prepared]], list[Result]],
        on_batch: Callable[[list[int], list[Result]], None] | None,
    ) -> list[Result]:
        started = time.perf_counter()
        self.started = self.started or started
        results: list[Result | None] = [None] * len(requests)
        size = max(self.batch_size, min(self.encoder.window_batches * self.batch_size, _WINDOW))
        for window in _windows(self.encoder.prepare, requests, text_of, size, self.batch_size):
            for batch in self._batches(window):
                found = self._worked(work, batch)
                for item, result in zip(batch, found, strict=True):
                    results[item.index] = result
                if on_batch:
                    on_batch([item.index for item in batch], found)
        self.seconds += time.perf_counter() - started
        return [result for result in results if result is not None]

    def _batches(self, window: list[Prepared]) -> Iterator[list[Prepared]]:
        """Questions about one image together, longest first: little padding, and the largest batch first."""
        groups: dict[tuple[bytes, ...], list[Prepared]] = {}
        for item in sorted(window, key=lambda item: -len(item.ids)):
            images = tuple(image.key for image in item.images) or (item.index.to_bytes(8, "big"),)
            groups.setdefault(images, []).append(item)
        order = [item for group in groups.values() for item in group]
        while order:
            size = self.batch_size  # which may have become less
            yield order[:size]
            order = order[size:]

    def _worked(self, work: Callable[[list[Prepared]], list[Result]], batch: list[Prepared]) -> list[Result]:
        """Return `work(batch)`; of "auto" in halves where memory has no room for the whole."""
        try:
            return work(batch)
        except RuntimeError as error:
            if not (self._may_shrink and len(batch) > 1 and should_reduce_batch_size(error)):
                raise
        # Outside the handler, whose error holds on to what the batch had.
        half: int = len(batch) // 2
        self.batch_size = min(self.batch_size, half)
        print(f"batch_size: {len(batch)} found no room, goes on with {self.batch_size}", file=sys.stderr)
        clear_device_cache(garbage_collection=True)
        return self._worked(work, batch[:half]) + self._worked(work, batch[half:])


def largest_batch(model: Any) -> int:
    """Return the largest power of two, 64 at most, whose samples fit in half of the memory that is free; and say so.

    A sample counts as 4,096 tokens, or as many as the model has positions: its keys and values, and one layer's activations.
    """
    config = model.config.text_config
    length = min(config.max_position_embeddings, _SAMPLE_TOKENS)
    sample, free = prefill_bytes(config, 1, length, model.dtype.itemsize), free_bytes(model.device)
    size = max(1, min(_MOST, int(_SHARE * free / sample)))
    size = 1 << (size.bit_length() - 1)
    print(
        f"batch_size: auto takes {size} ({length:,} tokens take about {sample / 2**30:.2f} GiB, "
        f"{free / 2**30:.1f} GiB are free on {model.device})",
        file=sys.stderr,
    )
    return size


def _windows(
    prepare: Callable[[int, Request, str], Prepared],
    requests: Sequence[Request],
    text_of: Callable[[Request], str],
    size: int,
    first: int,
) -> Iterator[list[Prepared]]:
    """Yield all of `requests` prepared, `size` at a time, the next window in the making while one is worked on.

    Nothing is worked on while the first window is made, so that it has `first` requests only; each has twice as many as the
    one before, up to `size`. `text_of` is what the model is given of a request. `requests` may build an item when it is
    indexed; that happens in the background thread too, in order.
    """

    def window(indices: range) -> list[Prepared]:
        found = ((index, requests[index]) for index in indices)
        return [prepare(index, request, text_of(request)) for index, request in found]

    ranges = _growing_ranges(len(requests), first, size)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = pool.submit(window, next(ranges, range(0)))
        for following in chain(ranges, (range(0),)):
            found = ahead.result()
            ahead = pool.submit(window, following)  # of none, behind the last
            try:
                yield found
            except GeneratorExit:
                ahead.cancel()
                raise


def _growing_ranges(total: int, first: int, most: int) -> Iterator[range]:
    start, length = 0, min(first, most)
    while start < total:
        yield range(start, min(start + length, total))
        start, length = start + length, min(2 * length, most)
