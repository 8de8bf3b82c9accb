"""`/v1/chat/completions`: transformers' handler; what differs is the policy, the checks and where the work is done."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers.cli.serving.chat_completion import (
    ChatCompletionHandler,
    TransformersCompletionCreateParamsStreaming,
)
from transformers.cli.serving.utils import GenerationState

from dynllava_plugin.errors import UserError
from dynllava_plugin.serve import messages
from dynllava_plugin.serve.batches import Batches
from dynllava_plugin.serve.fields import check_fields
from dynllava_plugin.serve.generation import RequestGeneration
from dynllava_plugin.serve.manager import OneModel
from dynllava_plugin.serve.policy import Policies


class Parameters(TransformersCompletionCreateParamsStreaming, total=False):  # type: ignore[call-arg]
    """A request's fields: OpenAI's, transformers', and `policy`."""

    policy: str


class ChatHandler(ChatCompletionHandler):
    """Answers of one model to the requests that wait, those with the same settings together, at most `batch_size`."""

    _valid_params_class = Parameters

    def __init__(self, manager: OneModel, batch_size: int) -> None:
        super().__init__(manager, GenerationState())
        self.policies = Policies(manager.model)
        self.batches = Batches(manager.model, batch_size)
        # A tokenizer's settings are its own for the time of a call: one call at a time.
        self.preparing = ThreadPoolExecutor(1)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Return a request's JSON or its stream; `UserError` for what the client can mend."""
        self._validate_request(body)
        model_id, model, processor = self._resolve_model(body)
        policy = body.get("policy")
        self.policies.check(policy)
        check_fields(body, model.config.text_config.vocab_size)
        stop = _stop(body)
        turns = messages.conversation(body.get("messages"))
        inputs = await self._inputs(body, turns, processor)
        inputs = inputs.to(model.device, dtype=model.dtype)
        config = self._generation_config(body, model, inputs["input_ids"].shape[-1])
        generation = RequestGeneration(self.batches, policy, body.get("seed"), stop)
        given = request_id, model, processor, model_id, inputs, config
        if body.get("stream"):
            return self._streaming(*given, gen_manager=generation, tools=body.get("tools"))
        return await self._non_streaming(*given, gen_manager=generation, tools=body.get("tools"))

    async def _inputs(self, body: dict[str, Any], turns: list[dict[str, Any]], processor: Any) -> Any:
        """Fetch and prepare away from the event loop, which other requests' streams need."""
        await asyncio.to_thread(messages.fetch_images, turns, processor)
        more = body.get("chat_template_kwargs") or {}

        def prepare() -> Any:
            return messages.tensors(turns, processor, body.get("tools"), more)

        return await asyncio.get_running_loop().run_in_executor(self.preparing, prepare)

    def _generation_config(self, body: dict[str, Any], model: Any, length: int) -> Any:
        """Return the request's generation settings, which fit behind a prompt of `length` tokens."""
        # The seed is set when the request's turn comes; a bias is a float to transformers.
        bias = {int(token): float(by) for token, by in (body.get("logit_bias") or {}).items()} or None
        config = self._build_generation_config(
            {**body, "seed": None, "logit_bias": bias}, model.generation_config
        )
        if body.get("temperature") is not None:
            config.do_sample = body["temperature"] > 0
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
