"""`/v1/chat/completions`: transformers' handler; what differs is the policy, the checks and where the work is done."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from transformers.cli.serving.chat_completion import (
    ChatCompletionHandler,
    TransformersCompletionCreateParamsStreaming,
)
from transformers.cli.serving.utils import GenerationState

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.registry import check_policy
from dynllava_plugin.serve import request
from dynllava_plugin.serve.batches import Batches
from dynllava_plugin.serve.generation import RequestGeneration

# Below, logits divided by it end as infinities, and the draw is the likeliest token anyway.
LEAST_TEMPERATURE = 1e-3


class Parameters(TransformersCompletionCreateParamsStreaming, total=False):  # type: ignore[call-arg]
    """A request's fields: OpenAI's, transformers', and `policy`."""

    policy: str


class ChatHandler(ChatCompletionHandler):
    """Answers of one model to the requests that wait, those with the same settings together.

    Parameters
    ----------
    name : str
        What requests call the model.
    model : SparseVLM
    processor : ProcessorMixin
    batch_size : int
        Requests that are answered together, at most.
    image_urls : str
        From where images are fetched (`fetching.Fetch`).
    """

    def __init__(self, name: str, model: Any, processor: Any, batch_size: int, image_urls: str) -> None:
        super().__init__(None, GenerationState())  # type: ignore[arg-type]  # its models are loaded by name
        self.name, self.model, self.processor, self.image_urls = name, model, processor, image_urls
        self.policies = Policies(model)
        self.batches = Batches(model, batch_size)
        # A tokenizer's settings are its own for the time of a call: one call at a time.
        self.preparing = ThreadPoolExecutor(1)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Return a request's JSON or its stream; `UserError` for what the client can mend."""
        model, processor = self.model, self.processor
        vocabulary = model.config.text_config.vocab_size
        request.check_fields(body, Parameters.__annotations__, vocabulary, processor.chat_template)
        if body.get("model") not in (None, self.name):
            raise UserError(f"model: {body['model']!r} isn't served here; {self.name!r} is")
        policy = body.get("policy")
        self.policies.check(policy)
        stop = _stop(body)
        turns = request.conversation(body.get("messages"))
        inputs = await self._inputs(body, turns, processor)
        inputs = inputs.to(model.device, dtype=model.dtype)
        config = self._generation_config(body, model, inputs["input_ids"].shape[-1])
        generation = RequestGeneration(self.batches, policy, body.get("seed"), stop)
        given = request_id, model, processor, self.name, inputs, config
        if not body.get("stream"):
            return await self._non_streaming(*given, gen_manager=generation, tools=body.get("tools"))
        stream = self._streaming(*given, gen_manager=generation, tools=body.get("tools"))
        stream.body_iterator = _as_openais(stream.body_iterator)  # type: ignore[arg-type]
        return stream

    async def _inputs(self, body: dict[str, Any], turns: list[dict[str, Any]], processor: Any) -> Any:
        """Fetch and prepare away from the event loop, which other requests' streams need."""
        await asyncio.to_thread(request.fetch_images, turns, processor, self.image_urls)
        more = body.get("chat_template_kwargs") or {}

        def prepare() -> Any:
            return request.tensors(turns, processor, body.get("tools"), more)

        return await asyncio.get_running_loop().run_in_executor(self.preparing, prepare)

    def _generation_config(self, body: dict[str, Any], model: Any, length: int) -> Any:
        """Return the request's generation settings, which fit behind a prompt of `length` tokens."""
        # The seed is set when the request's turn comes; a bias is a float to transformers.
        bias = {int(token): float(by) for token, by in (body.get("logit_bias") or {}).items()} or None
        config = self._build_generation_config(
            {**body, "seed": None, "logit_bias": bias}, model.generation_config
        )
        if body.get("temperature") is not None:
            config.do_sample = body["temperature"] >= LEAST_TEMPERATURE
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        room = model.config.text_config.max_position_embeddings - length
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if room < (asked or 1):
            wanted = f" and max_tokens {asked}" if asked else ""
            raise UserError(
                f"messages: {length} tokens{wanted} don't fit the model's {room + length}; shorten the text"
                f"{', take fewer images or a smaller max_tokens' if asked else ' or take fewer images'}"
            )
        config.max_new_tokens = min(config.max_new_tokens, room)
        config.num_beams = 1  # an answer goes out as it comes
        return config


def _stop(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise UserError("stop: give a text or a list of texts")
    return stop


def error_content(message: str, status: int) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _as_openais(frames: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield transformers' frames, an error as an object instead of a text, and what OpenAI's streams end with."""
    async with aclosing(frames) as open_frames:  # type: ignore[type-var]
        async for frame in open_frames:
            before, error, text = frame.partition('data: {"error": ')
            if error:
                content = error_content(json.loads(text.rstrip().removesuffix("}")), 500)
                yield f"{before}data: {json.dumps(content)}\n\n"
                return
            yield frame
    yield "data: [DONE]\n\n"


class Policies:
    """Checks a request's policy; says once that predictors are asked which nobody trained.

    Parameters
    ----------
    model : SparseVLM
        From `load_model`, which has said so of the model's own policy.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.said = not model.fresh_predictors or self._found(model.config.text_config.sparsity).predictors

    def check(self, policy: Any) -> None:
        """Raise `UserError` for a policy (None: the model's own) that is unknown or unfit for the model."""
        if policy is None:
            return
        if not isinstance(policy, str):
            raise UserError(f"policy: {policy!r} is not a text such as 'fastv,k=3'")
        settings = self.model.checked(self.model.config.text_config.sparsity, {"policy": policy})
        if self._found(settings).predictors and not self.said:
            self.said = True
            print(
                f"a request asks for {policy}: the checkpoint has no predictors, untrained ones stand in",
                file=sys.stderr,
            )

    def _found(self, settings: Any) -> Any:
        return check_policy(settings, self.model.config.text_config.num_hidden_layers)
