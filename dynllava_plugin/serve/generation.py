"""One request between transformers' handler and the batches: its text as it comes, its end when nobody listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _StreamError

from dynllava_plugin.serve.batches import Answer, Batches, Fault


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

    def close(self, fault: Fault | None) -> None:
        """End the stream, with a fault where there is one."""
        if fault is None:
            _tell(self.answer)
            self.end()
        else:
            super()._enqueue(_StreamError(json.dumps(fault.reason)[1:-1]))  # transformers writes the quotes

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

        Raises `HTTPException` where the model fails or the server ends.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Fault | None] = loop.create_future()

        def resolve(fault: Fault | None) -> None:
            if not ended.done():
                ended.set_result(fault)

        def end(fault: Fault | None) -> None:
            loop.call_soon_threadsafe(resolve, fault)

        feed = self._streamer(processor, asyncio.Queue(), None).feed  # sees stop texts
        answer = Answer(inputs, gen_config, self.policy, self.seed, feed, end)
        self.batches.submit(answer)
        try:
            fault = await ended
        except asyncio.CancelledError:
            answer.left.set()
            raise
        if fault is not None:
            raise HTTPException(*fault)
        _tell(answer)
        text = processor.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return StopTexts(self.stop_texts).cut(text), len(answer.ids), torch.tensor(answer.tokens)

    def _streamer(self, processor: Any, queue: asyncio.Queue, parser: Any) -> TextStreamer:
        tokenizer = processor.tokenizer._tokenizer
        return TextStreamer(tokenizer, asyncio.get_running_loop(), queue, parser, stop=self.stop_texts)


def _tell(answer: Answer | None) -> None:
    """Let transformers see that an answer of the full length has come to its own end: it counts tokens."""
    if answer is not None and not answer.cut:
        answer.config.max_new_tokens = None


class StopTexts:
    """Let text through up to the first stop text; what may be the beginning of one waits for the next piece."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.held, self.stopped = texts, "", False

    def feed(self, piece: str) -> str:
        """Return what can go out after `piece`."""
        if self.stopped:
            return ""
        text = self.held + piece
        cut = self.cut(text)
        if cut != text:
            self.held, self.stopped = "", True
            return cut
        waiting = max((_overlap(text, stop) for stop in self.texts), default=0)
        self.held = text[len(text) - waiting :]
        return text[: len(text) - waiting]

    def rest(self) -> str:
        """Return what waited when the answer ended."""
        rest, self.held = self.held, ""
        return rest

    def cut(self, text: str) -> str:
        """Return a whole `text` up to the first stop text."""
        places = [text.find(stop) for stop in self.texts]
        return text[: min((place for place in places if place >= 0), default=len(text))]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
