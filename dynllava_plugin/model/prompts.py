"""The conversation format LLaVA-1.5 was trained on (``vicuna_v1``), as text and as a chat template."""

from collections.abc import Sequence

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TOKEN = "<image>"
USER, ASSISTANT = "USER", "ASSISTANT"
QUESTION_END, ANSWER_END = " ", "</s>"


def vicuna_v1(turns: Sequence[tuple[str, str | None]]) -> str:
    """Return (question, answer) turns as LLaVA-1.5 does: ``SYSTEM USER: question ASSISTANT: answer</s>USER: question ASSISTANT:``.

    Questions carry their own ``<image>`` markers (see `with_images`). The last answer may be None, as in this example.

    Raises `ValueError` where there is no turn, or an answer is missing before the last one.
    """
    if not turns:
        raise ValueError("vicuna_v1: a conversation needs at least one turn")
    text = SYSTEM + QUESTION_END
    for index, (question, answer) in enumerate(turns):
        text += f"{USER}: {question}{QUESTION_END}{ASSISTANT}:"
        if answer is not None:
            text += f" {answer}{ANSWER_END}"
        elif index != len(turns) - 1:
            raise ValueError(f"vicuna_v1: turn {index} has no answer, but only the last turn may lack one")
    return text


def with_images(question: str, count: int = 1) -> str:
    """Return ``question`` with ``count`` image markers put before it, one a line, as LLaVA does."""
    return f"{IMAGE_TOKEN}\n" * count + question


# The same format for `processor.apply_chat_template`: a message's images come first, then its text.
CHAT_TEMPLATE = (
    "{% set ns = namespace(system='" + SYSTEM.replace("'", "\\'") + "') %}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{% if message['content'] is string %}{% set ns.system = message['content'] %}"
    "{% else %}{% set ns.system = message['content'] | selectattr('type', 'equalto', 'text') "
    "| map(attribute='text') | join(' ') %}{% endif %}"
    "{% endfor %}"
    "{{ ns.system }} "
    "{% for message in messages if message['role'] != 'system' %}"
    "{% set user = message['role'] == 'user' %}"
    "{{ 'USER: ' if user else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') }}"
    "{% endif %}"
    "{{ ' ' if user else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
