"""OpenAI messages to the model's tensors: images from data and http URLs, the family's own chat template."""

from __future__ import annotations

from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.images import open_image
from dynllava_plugin.model.processing import DynamicLlavaProcessor

ROLES = ("system", "user", "assistant")


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


def fetch_images(turns: list[dict[str, Any]], processor: Any) -> None:
    """Put PIL images in the place of URLs, as the family's own code would read a file.

    Raises
    ------
    UserError
        A URL that doesn't answer, or is no image.
    """
    for turn in turns:
        for part in turn["content"]:
            if part["type"] == "image":
                # LLaVA-1.5 doesn't turn photographs.
                turned = not isinstance(processor, DynamicLlavaProcessor)
                part["image"] = open_image(part["image"], "image_url", turned)


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
        raise UserError(f"messages: {' '.join(str(error).split())[:200]}") from None


def _writes_bos(processor: Any, turns: list[dict[str, Any]]) -> bool:
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text.startswith(processor.tokenizer.bos_token)
