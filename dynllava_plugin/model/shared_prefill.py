"""Prompts that begin alike prefill their beginning once.

A causal decoder sees an image before it sees the question behind it, and so does a policy that ranks image tokens by
themselves. So what a prompt has up to its last image token leaves the same keys and values whatever is asked, and the words
that all prompts begin with do whatever the images are. Such a beginning goes through the model once, and each prompt
continues behind a copy of its cache. LLaVA-1.5's prompt has 35 tokens before its 576 image tokens; GQA asks 31 questions of an
image, POPE 18, VQAv2 5.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

# Of a batch's tokens, layer by layer: less isn't worth a second call of the model and a mask that isn't merely causal.
LEAST_SAVED = 0.25


def share_prefill(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    images: Sequence[Hashable],
    encode: Callable[[Sequence[int]], dict[str, Any]],
    tokens_per_image: int,
    pad_token_id: int = 0,
    least_saved: float = LEAST_SAVED,
) -> dict[str, Any] | None:
    """Return arguments for `model.generate` that stand for a batch of prompts; None where sharing isn't possible or saves little.

    `input_ids` and `attention_mask` int64 [B, L] are padded on the left by `pad_token_id`. The B `images` are hashable, equal for
    prompts with the same images; `encode` takes places of prompts in the batch to ``mm_encoder_outputs`` of their images, in
    order. At least `least_saved` of the batch's tokens, layer by layer, must be saved.

    What is returned are ``input_ids`` and ``attention_mask`` [B, L'], a beginning's padding before it and the rest's padding behind
    it, ``cache`` with B samples and their beginnings in it, and ``mm_encoder_outputs`` of the images behind them. Answers
    equal those of whole prompts up to the rounding of another matrix shape, as those of another batch size do. Sharing is impossible
    where a prompt has no image or ends with one, or with a policy that `reads_question`.
    """
    is_image = input_ids == model.config.image_token_id
    policy = model.model.language_model.policy
    if policy.reads_question or policy.sequential or policy.attention_layers:
        return None
    if not bool(is_image.any(1).all()) or bool(is_image[:, -1].any()):
        return None
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = (input_ids.shape[1] - attention_mask.sum(1)).tolist()
    before = torch.where(is_image, columns, input_ids.shape[1]).amin(1).tolist()
    behind = torch.where(is_image, columns, -1).amax(1).add(1).tolist()
    ids = input_ids.tolist()
    columns_of = zip(*(ids[row][starts[row] : end] for row, end in enumerate(before)), strict=False)
    words = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns_of))
    parts = [(images[row], *ids[row][starts[row] : end]) for row, end in enumerate(behind)]
    costs = _costs(model, is_image, tokens_per_image)
    in_words = _Split.of([0] * len(ids), starts, [start + words for start in starts], costs)
    split = max(in_words, _Split.of(parts, starts, behind, costs), key=lambda one: one.saved)
    if split.saved < least_saved * float(costs[attention_mask.bool()].sum()):
        return None
    images_first = split is not in_words
    new_ids, mask, width = split.apart(input_ids, pad_token_id)
    cache = model.new_cache()
    model(
        input_ids=new_ids[split.chosen, :width],
        attention_mask=mask[split.chosen, :width],
        cache=cache,
        mm_encoder_outputs=encode(split.chosen) if images_first else None,
        logits_to_keep=1,
    )
    cache.batch_select_indices(torch.tensor([split.chosen.index(row) for row in split.owners]))
    rest = {} if images_first else encode(range(len(ids)))
    return {
        "input_ids": new_ids,
        "attention_mask": mask,
        "cache": cache,
        "mm_encoder_outputs": rest,
    }


@dataclass(frozen=True)
class _Split:
    """Where each prompt's beginning is, and which prompt's stands for it."""

    starts: list[int]  # columns
    ends: list[int]
    owners: list[int]  # of each prompt the first one that begins like it
    chosen: list[int]  # those that any begins like
    saved: float  # of the batch's costs

    @classmethod
    def of(cls, keys: Sequence[Hashable], starts: list[int], ends: list[int], costs: torch.Tensor) -> _Split:
        """Return the split of prompts, which begin alike where `keys` are equal; `costs` float [B, L] are each token's."""
        first: dict[Hashable, int] = {}
        owners = [first.setdefault(key, row) for row, key in enumerate(keys)]
        alike = [row for row, owner in enumerate(owners) if owner != row]
        saved = sum(float(costs[row, starts[row] : ends[row]].sum()) for row in alike)
        return cls(starts, ends, owners, list(first.values()), saved)

    def apart(self, input_ids: torch.Tensor, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return ids and mask [B, width + rest], and the width: beginnings end where the first `width` columns do."""
        total = input_ids.shape[1]
        lengths = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        width = max(lengths)
        ids = input_ids.new_full((len(input_ids), width + total - min(self.ends)), pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
            ids[row, width - lengths[row] : width] = input_ids[row, start:end]
            mask[row, width - lengths[row] : width] = 1
            if end < total:
                ids[row, end - total :] = input_ids[row, end:]
                mask[row, end - total :] = 1
        return ids, mask, width


def _costs(model: Any, is_image: torch.Tensor, total: int) -> torch.Tensor:
    """float [B, L]: the share of the layers that a token goes through."""
    policy, layers = model.model.language_model.policy, model.config.text_config.num_hidden_layers
    share = policy.image_tokens(total, policy.kept_tokens(total), layers) / total
    return torch.where(is_image, share, 1.0)
