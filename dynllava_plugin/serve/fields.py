"""The ranges of a request's fields, and the fields of OpenAI's that would change an answer and that nothing here carries out."""

from __future__ import annotations

import json
from typing import Any

from dynllava_plugin.errors import UserError

# transformers' server passes over these in silence: a client that asks for two choices or for JSON would take what it gets for that.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


def check_fields(body: dict[str, Any], vocabulary: int) -> None:
    """Refuse what `generate` would fail on, or what would be left undone without a word; None is a field that isn't there.

    Raises
    ------
    UserError
        A value out of range, a biased token outside of `vocabulary`, a field that isn't supported.
    """
    for name, neutral in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise UserError(f"{name}: {body[name]!r} is not supported; leave it out")
    for name in ("max_tokens", "max_completion_tokens"):
        _check(body, name, lambda value: type(value) is int and value > 0, "a positive whole number")
    _check(body, "temperature", lambda value: _number(value) and 0 <= value <= 2, "between 0 and 2")
    _check(body, "top_p", lambda value: _number(value) and 0 < value <= 1, "above 0 and at most 1")
    _check(
        body, "frequency_penalty", lambda value: _number(value) and -1 < value <= 2, "above -1 and at most 2"
    )
    _check(body, "seed", lambda value: type(value) is int and abs(value) < 2**63, "a whole number of 64 bits")
    _check(
        body, "generation_config", _length_only, 'as {"max_new_tokens": 64, "do_sample": false}, a JSON text'
    )
    _check(body, "chat_template_kwargs", lambda value: isinstance(value, dict), "an object")
    _check(body, "logit_bias", lambda value: isinstance(value, dict), "an object of tokens and biases")
    for token, bias in (body.get("logit_bias") or {}).items():
        if not (token.isdecimal() and int(token) < vocabulary and _number(bias) and -100 <= bias <= 100):
            raise UserError(
                f"logit_bias: {token!r}: {bias!r} is not one of {vocabulary} tokens and between -100 and 100"
            )


def _check(body: dict[str, Any], name: str, holds: Any, wanted: str) -> None:
    value = body.get(name)
    if value is not None and not holds(value):
        raise UserError(f"{name}: {value!r} is not {wanted}")


def _length_only(value: Any) -> bool:
    """Whether it asks for an answer of a given length, the model's own settings and end token left out, as `bench serve` does."""
    try:
        settings = json.loads(value)
    except (TypeError, ValueError):
        return False
    if not isinstance(settings, dict) or not settings.keys() <= {"max_new_tokens", "do_sample"}:
        return False
    length = settings.get("max_new_tokens")
    return type(length) is int and length > 0 and type(settings.get("do_sample", False)) is bool


def _number(value: Any) -> bool:
    return type(value) in (int, float)
