"""What a request asks: the ranges of its fields, and its messages as the model's tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from PIL import Image
from transformers.processing_utils import _get_template_variables

from dynllava_plugin.errors import UserError, nearest, one_line
from dynllava_plugin.images import open_image
from dynllava_plugin.model.processing import DynamicLlavaProcessor
from dynllava_plugin.serve.fetching import Fetch

# Of a request's images together, 1 GiB as RGB: a few hundred KiB of PNG may hold as many. Of one image PIL's own limit holds.
MOST_PIXELS = 4 * (Image.MAX_IMAGE_PIXELS or 0)
ROLES = ("system", "user", "assistant")
# What a chat template is given by whoever runs it: no setting of a request's.
GIVEN = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "raise_exception",
    "strftime_now",
)
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


def check_fields(body: dict[str, Any], known: Iterable[str], vocabulary: int, template: str) -> None:
    """Refuse what `generate` would fail on, or what would be left undone without a word; None is a field that isn't there.

    Parameters
    ----------
    known : iterable of str
        Fields that a request may have.
    vocabulary : int
        Tokens that can have a bias.
    template : str
        The checkpoint's chat template, which reads `tools` and settings of its own or doesn't.

    Raises
    ------
    UserError
        An unknown field, one that isn't supported, a value out of range.
    """
    for name in body:
        if name not in known:
            raise UserError(f"{name}: no such field; {nearest(name, known, 'leave it out')}")
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
    _check(body, "stream", lambda value: type(value) is bool, "true or false")
    _check(body, "chat_template_kwargs", lambda value: isinstance(value, dict), "an object")
    read = _get_template_variables(template)
    for name in body.get("chat_template_kwargs") or {}:
        if name not in read or name in GIVEN:
            own = ", ".join(sorted(read.difference(GIVEN))) or "none"
            raise UserError(
                f"chat_template_kwargs: {name} is no setting of this checkpoint's chat template; it has {own}"
            )
    if body.get("tools") and "tools" not in read:
        raise UserError("tools: this checkpoint's chat template doesn't know them; leave them out")
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


def conversation(messages: Any) -> list[dict[str, Any]]:
    """Return a request's `messages` as chat templates take them, with images still as URLs.

    Raises
    ------
    UserError
        Anything but text and images by data, http or https URL; a last turn that isn't the user's.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: give a list of at least one message")
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if turns[-1]["role"] != "user":
        raise UserError("messages: the last one must be the user's")
    return turns


def _turn(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UserError(f"{where}.role: give one of {', '.join(ROLES)}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise UserError(f"{where}.content: give a text or a list of parts")
    return {"role": message["role"], "content": [_part(part, f"{where}.content") for part in parts]}


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        given = part.get("image_url")
        url = given.get("url") if isinstance(given, dict) else given
        # A path would show the server's own files to its clients.
        if isinstance(url, str) and url.startswith(("http://", "https://", "data:")):
            return {"type": "image", "image": url}
        raise UserError(f"{where}: an image_url must be a data:, http:// or https:// URL")
    raise UserError(f"{where}: a part must be a text or an image_url, not {kind or part!r}")


def fetch_images(turns: list[dict[str, Any]], processor: Any, allowed: str) -> None:
    """Put PIL images in the place of URLs, as the family's own code would read a file; `allowed` is `Fetch`'s.

    Raises
    ------
    UserError
        A URL that doesn't answer or may not be fetched, or is no image; images of more than `MOST_PIXELS` together.
    """
    fetch, pixels = Fetch(allowed), 0
    for turn in turns:
        for part in turn["content"]:
            if part["type"] == "image":
                # LLaVA-1.5 doesn't turn photographs.
                turned = not isinstance(processor, DynamicLlavaProcessor)
                part["image"] = image = open_image(part["image"], "image_url", turned, fetch)
                pixels += image.width * image.height
                if pixels > MOST_PIXELS:
                    raise UserError(
                        f"image_url: the request's images have more than {MOST_PIXELS} pixels together; send smaller ones"
                    )


def tensors(turns: list[dict[str, Any]], processor: Any, tools: Any, template: dict[str, Any]) -> Any:
    """Return the model's inputs [1, L] for a conversation; an image token in a text is text, not an image's place.

    Raises
    ------
    UserError
        A conversation that the family's chat template refuses.
    """
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    texts = [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]
    if any(token in text for token in special for text in texts):
        # transformers then wants the template to write what the tokenizer would add: the token of the beginning.
        begins = tokenizer.encode("") == [tokenizer.bos_token_id]
        written = "{{ bos_token }}" if begins and not _writes_bos(processor, turns) else ""
        template |= {"sanitize_control_tokens": True, "chat_template": written + processor.chat_template}
    try:
        return processor.apply_chat_template(
            turns, add_generation_prompt=True, tools=tools, tokenize=True, return_dict=True, return_tensors="pt",
            **template,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # templates raise jinja2's errors, with their own words
        raise UserError(f"messages: {one_line(error, 200)}") from None


def _writes_bos(processor: Any, turns: list[dict[str, Any]]) -> bool:
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text.startswith(processor.tokenizer.bos_token)
