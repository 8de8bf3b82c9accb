"""One request between transformers' handler and the batches: its text as it comes, its end when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _StreamError

from dynllava_plugin.serve.batches import Answer, Batches
from dynllava_plugin.serve.stopping import StopTexts


class TextStreamer(DirectStreamer):
    """transformers' streamer; no text from a stop text on goes out, and who doesn't listen any more leaves the batch."""

    def __init__(self, *args: Any, stop: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first = False  # transformers' first call brings the prompt, ours the first token
        self.stop = StopTexts(stop)
        self.answer: Answer | None = None

    def cancel(self) -> None:
        """Let the answer end with its next token: nobody listens."""
        if self.answer is not None:
            self.answer.left.set()

    def feed(self, token: int) -> bool:
        """Send what the token adds; return whether a stop text has come."""
        self.put(torch.tensor([token]))
        return self.stop.stopped

    def close(self, error: str | None) -> None:
        """End the stream, with an error's message where there is one."""
        if error is None:
            self.end()
        else:
            super()._enqueue(_StreamError(error.replace('"', "'")))

    def _enqueue(self, item: Any) -> None:
        if item is None:
            rest = self.stop.rest()
            if rest:
                super()._enqueue(rest)
        elif type(item) is str:
            item = self.stop.feed(item)
            if not item:
                return
        super()._enqueue(item)


class RequestGeneration(GenerateManager):
    """A request's place among the batches.

    Parameters
    ----------
    batches : Batches
    policy : str, optional
        Of this request; default: the model's.
    seed : int, optional
        Set right before this request's turn: other requests don't move it.
    stop : sequence of str
        Texts that end the answer and don't belong to it.
    """

    def __init__(self, batches: Batches, policy: str | None, seed: int | None, stop: Sequence[str]) -> None:
        self.batches, self.policy, self.seed, self.stop_texts = batches, policy, seed, stop

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, DirectStreamer]:
        """Start; return the queue of texts, which None ends, and the streamer."""
        queue: asyncio.Queue = asyncio.Queue()
        streamer = self._streamer(processor, queue, response_parser)
        streamer.answer = Answer(inputs, gen_config, self.policy, self.seed, streamer.feed, streamer.close)
        self.batches.submit(streamer.answer)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, torch.Tensor]:
        """Return the text, the prompt's length in tokens and the answer's tokens int64 [T]; cancelled, its place is freed.

        Raises `HTTPException` where the model fails, `CancelledError` where the server ends.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str | None] = loop.create_future()

        def resolve(error: str | None) -> None:
            if not ended.done():
                ended.set_result(error)

        def end(error: str | None) -> None:
            loop.call_soon_threadsafe(resolve, error)

        feed = self._streamer(processor, asyncio.Queue(), None).feed  # sees stop texts
        answer = Answer(inputs, gen_config, self.policy, self.seed, feed, end)
        self.batches.submit(answer)
        try:
            error = await ended
        except asyncio.CancelledError:
            answer.left.set()
            raise
        if error is not None:
            raise HTTPException(500, error)
        if answer.left.is_set():
            raise asyncio.CancelledError
        text = processor.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return StopTexts(self.stop_texts).cut(text), len(answer.ids), torch.tensor(answer.tokens)

    def _streamer(self, processor: Any, queue: asyncio.Queue, parser: Any) -> TextStreamer:
        tokenizer = processor.tokenizer._tokenizer
        return TextStreamer(tokenizer, asyncio.get_running_loop(), queue, parser, stop=self.stop_texts)
