"""Where each token stands: its place in the text, and its position ids where those differ."""

from __future__ import annotations

from dataclasses import replace

import torch

from dynllava_plugin.model.packing import Tokens
from dynllava_plugin.sparsity.cache import SparseContextCache


def token_positions(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    valid: torch.Tensor,
    cache: SparseContextCache | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's place in its text, int64 [B or 1, L], and its position ids, [3, B, L] where they differ."""
    if position_ids is not None and position_ids.dim() == 2:
        return position_ids, position_ids
    if position_ids is not None and position_ids.shape[0] == 4:
        return position_ids[0], position_ids[1:]
    if attention_mask is not None:
        text = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -valid.shape[1] :]
    else:
        text = torch.arange(valid.shape[1], device=valid.device)[None]
        if cache is not None and cache.fed is not None:
            text = text + cache.fed
    if position_ids is not None:
        return text, position_ids
    if cache is not None and cache.offset is not None:
        return text, (text + cache.offset)[None].expand(3, -1, -1)
    return text, text


def position_offset(
    positions: torch.Tensor, valid: torch.Tensor, cache: SparseContextCache | None
) -> torch.Tensor:
    """int64 [B, 1]: the position id behind the call's last one, less the tokens fed until then; `positions` [3, B, L]."""
    last = positions.amax(0).masked_fill(~valid, -1).amax(1, keepdim=True)
    fed = valid.sum(1, keepdim=True)
    return last + 1 - (fed if cache is None or cache.fed is None else cache.fed + fed)


def moved_up(tokens: Tokens, gone: torch.Tensor, cache: SparseContextCache | None) -> Tokens:
    """The tokens with position ids less by the tokens before them that are `gone` bool [B, L]."""
    if cache is not None:
        cache.move_up(gone.sum(1, keepdim=True))
    less = gone.cumsum(1)
    same = tokens.text_positions is tokens.position_ids
    positions = tokens.position_ids - less
    return replace(
        tokens, position_ids=positions, text_positions=positions if same else tokens.text_positions - less
    )
