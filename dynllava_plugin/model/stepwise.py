"""Teacher-forced scoring one token at a time, for policies whose decisions depend on every step before."""

from __future__ import annotations

from typing import Any

import torch

from dynllava_plugin.sparsity.objective import label_log_probs
from dynllava_plugin.sparsity.selection import last_answer


def score_step_by_step(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    images: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `DynamicLlavaForConditionalGeneration.score` returns: log-probabilities, and where greedy decoding agrees."""
    output = last_answer(labels)
    valid = torch.ones_like(output) if attention_mask is None else attention_mask.bool()
    columns = torch.arange(labels.shape[1], device=labels.device)
    start = torch.where(output, columns, labels.shape[1]).amin(1)  # [B] first output column
    scores = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    greedy = torch.zeros_like(output)

    def note(rows: torch.Tensor, where: torch.Tensor, logits: torch.Tensor) -> None:
        target = labels[rows, where]
        scores[rows, where] = label_log_probs(logits, target)
        greedy[rows, where] = logits.argmax(-1) == target

    prompt, there = _packed(valid & (columns < start[:, None]), left=True)
    out = model(
        input_ids.gather(1, prompt).masked_fill(~there, 0),  # padding must not look like an image's place
        attention_mask=there.long(),
        use_cache=True,
        **images,
    )
    # A prompt row predicts the token whose row comes next, as in `score`.
    index = torch.where(out.token_index >= 0, prompt.gather(1, out.token_index.clamp(min=0)), -1)
    wanted = (
        (index[:, :-1] >= 0) & (index[:, 1:] >= 0) & (labels.gather(1, index[:, 1:].clamp(min=0)) != -100)
    )
    note(wanted.nonzero()[:, 0], index[:, 1:][wanted], out.logits[:, :-1][wanted])

    answer, real = _packed(output & valid, left=False)
    mask, logits = there.long(), out.logits[:, -1]
    for step in range(answer.shape[1]):
        rows = real[:, step].nonzero()[:, 0]
        note(rows, answer[rows, step], logits[rows])
        if step + 1 < answer.shape[1]:
            mask = torch.cat([mask, real[:, step : step + 1].long()], 1)
            out = model(
                input_ids.gather(1, answer[:, step : step + 1]),
                attention_mask=mask,
                past_key_values=out.past_key_values,
            )
            logits = out.logits[:, -1]
    return scores, greedy


def _packed(mask: torch.Tensor, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, L] -> (int64 [B, n] columns of its True places in order, padded on the `left` or right; bool which are real)."""
    counts = mask.sum(1, keepdim=True)
    width = int(counts.max())
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    slots = torch.arange(width, device=mask.device)
    if not left:
        return order, slots < counts
    slots = slots - (width - counts)
    return order.gather(1, slots.clamp(min=0)), slots >= 0
