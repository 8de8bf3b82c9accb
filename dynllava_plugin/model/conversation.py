"""A conversation over one KV cache: each turn feeds what is new and nothing again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.sparsity.cache import CACHE_NAME, SparseContextCache

_ANSWER = "zq7answer7qz"  # stands for an answer where the template shows what follows one


class Conversation:
    """One user's turns with a model, in the checkpoint's chat template.

    What a turn decided stays decided: an image's tokens are chosen when it comes, and what the text predictor drops of an answer
    is no context for later turns. `model` and `processor` are as `load_model` gives them, of any family; `policy`,
    ``"fastv,k=3"``, is that of all turns (default: the model's own), `settings` are those of every turn's `model.generate`.
    """

    def __init__(self, model: Any, processor: Any, policy: str | None = None, **settings: Any) -> None:
        self.model, self.processor, self.policy, self.settings = model, processor, policy, settings
        self.cache: SparseContextCache | None = None  # what the turns so far left; None before the first
        self.ids = torch.empty(1, 0, dtype=torch.int64, device=model.device)  # [1, L], tokens so far
        self.answers: list[str] = []
        self.spans: list[tuple[int, int]] = []  # where each answer begins and ends in `ids`
        self._question = ""

    def ask(self, question: str, *images: Any, **settings: Any) -> str:
        """Return the answer to a question about `images` (PIL images or what the family's processor takes) and all before.

        Raises `UserError` as the processor and `generate` do; for a conversation longer than the model has positions, or one
        whose last turn was cut short.
        """
        if self.cache is not None and self.cache.seen != self.ids.shape[1]:
            raise UserError("ask: the turn before was cut short; start a new conversation")
        inputs = self._new_inputs(question, images)
        new = inputs.pop("input_ids")
        ids = torch.cat([self.ids, new], 1)
        room = self.model.config.text_config.max_position_embeddings
        if ids.shape[1] >= room:
            raise UserError(f"ask: {ids.shape[1]} tokens with this turn, of {room}; start a new conversation")
        output = self.model.generate(
            input_ids=ids,
            **{**inputs, "attention_mask": torch.ones_like(ids)},
            **{**self.settings, **settings},
            policy=self.policy,
            cache=self.cache,
            return_dict_in_generate=True,
        )
        self.cache, self.ids, self._question = getattr(output, CACHE_NAME), output.sequences, question
        self._end_answer()
        self.spans.append((ids.shape[1], self.ids.shape[1]))
        answer = self.processor.tokenizer.decode(self.ids[0, ids.shape[1] :], skip_special_tokens=True)
        self.answers.append(answer.strip())
        return self.answers[-1]

    def _end_answer(self) -> None:
        """The last token hasn't been fed: one that ends the answer is the template's to write, any other is output text."""
        ends = self.model.generation_config.eos_token_id
        if int(self.ids[0, -1]) in ([ends] if isinstance(ends, int) else ends or []):
            self.ids = self.ids[:, :-1]
            return
        with torch.no_grad(), self.model.policy_in_force(self.policy):
            self.model(
                self.ids[:, -1:],
                attention_mask=torch.ones_like(self.ids),
                cache=self.cache,
                logits_to_keep=1,
            )

    def _new_inputs(self, question: str, images: tuple[Any, ...]) -> dict[str, Any]:
        """Return the processor's tensors of what the template writes behind the last answer."""
        places = [{"type": "image", "image": image} for image in images]
        turns = [_turn("user", question, places)]
        if self.cache is None:
            inputs = self.processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            turns = [_turn("user", self._question), _turn("assistant", _ANSWER), *turns]
            text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            text = text.rpartition(_ANSWER)[2]
            inputs = self.processor(
                images=list(images) or None, text=[text], add_special_tokens=False, return_tensors="pt"
            )
        return dict(inputs.to(self.model.device, self.model.dtype))


def _turn(role: str, text: str, images: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}
