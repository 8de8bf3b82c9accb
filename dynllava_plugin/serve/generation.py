"""One request's generation on the server's inference thread: its policy, seed, stop texts, and its end when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    InferenceThread,
    _GenerationCancelled,
    _StreamError,
    set_torch_seed,
)

from dynllava_plugin.serve.stopping import StopTexts


class TextStreamer(DirectStreamer):
    """transformers' streamer; no text from a stop text on goes out."""

    def __init__(self, *args: Any, stop: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop = StopTexts(stop)

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

    def fail(self, message: str) -> None:
        """End the stream with an error."""
        super()._enqueue(_StreamError(message))


class RequestGeneration(GenerateManager):
    """`model.generate()` for one request; the thread is the server's, so that requests take turns.

    Parameters
    ----------
    thread : InferenceThread
    running : set
        Streamers of the requests that wait or run; this one's is in it until it ends.
    policy : str, optional
        Of this request; default: the model's.
    seed : int, optional
        Set right before this request's turn: other requests don't move it.
    stop : sequence of str
        Texts that end the answer and don't belong to it.
    """

    def __init__(
        self,
        thread: InferenceThread,
        running: set[DirectStreamer],
        policy: str | None,
        seed: int | None,
        stop: Sequence[str],
    ) -> None:
        self._thread, self.running = thread, running
        self.policy, self.seed, self.stop_texts = policy, seed, stop

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, DirectStreamer]:
        """Start; returns the queue of texts, which None ends, and the streamer."""
        queue: asyncio.Queue = asyncio.Queue()
        streamer = TextStreamer(
            processor.tokenizer._tokenizer, asyncio.get_running_loop(), queue, response_parser, stop=self.stop_texts
        )  # fmt: skip
        self.running.add(streamer)

        def work() -> None:
            try:
                self._generate(model, processor, inputs, gen_config, streamer)
            except _GenerationCancelled:
                streamer.end()
            except Exception as error:
                streamer.fail(" ".join(str(error).split()).replace('"', "'") or type(error).__name__)
            finally:
                self.running.discard(streamer)

        self.submit(work)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """Return the text, the prompt's length in tokens and the answer's tokens; cancelled, the thread is freed."""
        streamer = DirectStreamer(processor.tokenizer._tokenizer, asyncio.get_running_loop(), asyncio.Queue())
        self.running.add(streamer)

        def work() -> Any:
            try:
                return self._generate(model, processor, inputs, gen_config, streamer)
            except _GenerationCancelled:
                return None  # nobody waits for it, or the server ends
            finally:
                self.running.discard(streamer)

        try:
            # Shielded: the thread sets the result of a cancelled request, too.
            sequences = await asyncio.shield(self.async_submit(work))
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        if sequences is None:
            raise asyncio.CancelledError
        length = inputs["input_ids"].shape[-1]
        answer = sequences[0, length:]
        text = StopTexts(self.stop_texts).cut(processor.tokenizer.decode(answer, skip_special_tokens=True))
        return text, length, answer

    def _generate(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, streamer: DirectStreamer
    ) -> Any:
        if self.seed is not None:
            set_torch_seed(self.seed)
        more: dict[str, Any] = {"tokenizer": processor.tokenizer} if self.stop_texts else {}
        return model.generate(
            **inputs, generation_config=gen_config, streamer=streamer, policy=self.policy, **more
        )
