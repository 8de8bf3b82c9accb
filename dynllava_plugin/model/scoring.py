"""`score()`: an answer's log-probabilities under the sparsified decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.gate import packed_columns
from dynllava_plugin.model.training import IGNORE_INDEX, labels_at
from dynllava_plugin.sparsity.cache import CACHE_NAME
from dynllava_plugin.sparsity.objective import label_log_probs
from dynllava_plugin.sparsity.selection import last_answer


@dataclass
class ScoreDetails:
    """Scores of given text, by the input's columns.

    `log_probs` float32 [B, L] are each label's, 0 where the label is -100; `greedy` bool [B, L] tells where the label is the most
    probable token; `image_keep` bool [B, N_img] and `text_keep` bool [B, L] are the decisions on image and output tokens, as
    in `DynamicLlavaOutput`.
    """

    log_probs: torch.Tensor
    greedy: torch.Tensor
    image_keep: torch.Tensor | None = None
    text_keep: torch.Tensor | None = None

    @classmethod
    def of(cls, labels: torch.Tensor) -> ScoreDetails:
        """Return scores of labels int64 [B, L] of which none is known yet."""
        zeros = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        return cls(zeros, zeros.bool())

    def note(
        self, rows: torch.Tensor, columns: torch.Tensor, logits: torch.Tensor, target: torch.Tensor
    ) -> None:
        """Write what logits [n, V] say of the labels `target` int64 [n] at `rows` and `columns`."""
        self.log_probs[rows, columns] = label_log_probs(logits, target)
        self.greedy[rows, columns] = logits.argmax(-1) == target


class SparseScoring(nn.Module):
    """Of `SparseVLM`: scores of given answers."""

    model: Any

    def score(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Return float32 [B, L], teacher-forced log-probabilities under the sparsified decode; 0 where the label is -100.

        It takes one pass, which equals step by step. The arguments are those of `forward`: `labels` int64 [B, L] are ignored where
        they are -100; their last run is the output text, earlier ones are scored as prompt text.

        Raises `UserError` for labels of another shape; weights whose logits are not finite.
        """
        return self.score_details(input_ids, attention_mask, pixel_values, labels, **inputs).log_probs

    @torch.no_grad()
    def score_details(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **images: Any,
    ) -> ScoreDetails:
        """Return what `score` does with the decisions behind it.

        `output_mask` bool [B, L] is output text in place of the last run of labels, e.g. every answer of a conversation.
        """
        if labels is None or labels.shape != input_ids.shape:
            raise UserError("labels: score needs labels of the shape of input_ids")
        llm: Any = self.model.language_model
        was_training = self.training
        self.eval()
        try:
            policy = llm.policy
            self.check_family(policy)  # type: ignore[operator]
            output = last_answer(labels) if output_mask is None else output_mask.bool()
            images["pixel_values"] = pixel_values
            if policy.sequential:
                if not torch.equal(output, last_answer(labels)):
                    raise UserError(
                        f"output_mask: {policy.name} is scored token by token, one answer at a time"
                    )
                images["mm_encoder_outputs"] = mm_encoder_outputs
                found = score_step_by_step(self, input_ids, attention_mask, labels, images)
            else:
                tokens, _ = self._embed(  # type: ignore[operator]
                    policy, images, input_ids, attention_mask, encoded=mm_encoder_outputs, output=(output, 0)
                )
                outputs = llm(use_cache=False, tokens=tokens)
                found = ScoreDetails.of(labels)
                target = labels_at(labels, outputs.token_index)[:, 1:]
                wanted = target != IGNORE_INDEX
                logits = self._logits(outputs.last_hidden_state[:, :-1][wanted])  # type: ignore[operator]
                columns = outputs.token_index[:, 1:][wanted]
                found.note(wanted.nonzero()[:, 0], columns, logits, target[wanted])
                found.image_keep, output = outputs.decision.image_keep, outputs.decision.text_keep
            found.text_keep = output
        finally:
            self.train(was_training)
        self.refuse_not_finite(found.log_probs)  # type: ignore[operator]
        return found


def score_step_by_step(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    images: dict[str, Any],
) -> ScoreDetails:
    """Return what `score_details` does, one token at a time, for policies whose decisions depend on every step before."""
    output = last_answer(labels)
    valid = torch.ones_like(output) if attention_mask is None else attention_mask.bool()
    columns = torch.arange(labels.shape[1], device=labels.device)
    start = torch.where(output, columns, labels.shape[1]).amin(1)  # [B] first output column
    found = ScoreDetails.of(labels)

    before = valid & (columns < start[:, None])
    prompt, there = packed_columns(before, before.sum(1).tolist())
    # Padding must not look like an image's place.
    ids = input_ids.gather(1, prompt).masked_fill(~there, 0)
    out = model(ids, attention_mask=there.long(), use_cache=True, **images)
    # A prompt row predicts the token whose row comes next, as in `score`.
    index = torch.where(out.token_index >= 0, prompt.gather(1, out.token_index.clamp(min=0)), -1)
    target = labels_at(labels, index)[:, 1:]
    wanted = target != IGNORE_INDEX
    found.note(wanted.nonzero()[:, 0], index[:, 1:][wanted], out.logits[:, :-1][wanted], target[wanted])

    answer = output & valid
    counts = answer.sum(1)
    order = (~answer).to(torch.uint8).argsort(dim=1, stable=True)
    mask, logits = there.long(), out.logits[:, -1]
    for step in range(int(counts.max())):
        rows, where = (counts > step).nonzero()[:, 0], order[:, step]
        found.note(rows, where[rows], logits[rows], labels[rows, where[rows]])
        mask = torch.cat([mask, (counts > step).long()[:, None]], 1)
        if step + 1 < int(counts.max()):
            token = input_ids.gather(1, where[:, None])
            out = model(token, attention_mask=mask, cache=getattr(out, CACHE_NAME))
            logits = out.logits[:, -1]
    return found
