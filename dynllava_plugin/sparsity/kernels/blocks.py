"""The training attention (Eq. 7) in strips of the score matrix, on any device torch has.

A strip is a few rows of one sample. Its columns are the kept tokens before it, packed side by side, and then its own tokens, for
which the causal order and the diagonal of G matter. So nothing behind the strip is computed, dropped and padded tokens before it
cost nothing, and no mask wider than a strip exists. The backward pass computes each strip again, and there alone scores of dropped
tokens, for the gradient of their keep mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

KEPT, DROPPED, PADDING = 0, 1, 2
_ROWS = 128  # of a strip
# Scores held at a time: few enough for a processor's cache, many enough for a device with cores to fill.
_SCORES = {"cpu": 2**20}
_SCORES_ELSEWHERE = 2**25


def empty_output(query: torch.Tensor) -> torch.Tensor:
    """Return an empty [B, H, L, D] laid out as [B, L, H, D], which the output projection reads without a copy."""
    batch, heads, length, dim = query.shape
    return query.new_empty(batch, length, heads, dim).transpose(1, 2)


def empty_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor of the shape and, where its last dimension is dense, the layout of the given one."""
    return torch.empty_like(tensor) if tensor.stride(-1) == 1 else tensor.new_empty(tensor.shape)


@dataclass
class Strip:
    """Rows [start, stop) of a sample."""

    start: int
    stop: int
    kept: torch.Tensor  # the strip's own kept tokens, counted from `start`
    kept_before: int  # how many are in front of it
    dropped_before: int
    dropped_through: int  # how many dropped tokens are in front of its end
    hidden: torch.Tensor  # bool [rows, rows]: what its tokens don't see of each other
    later: torch.Tensor  # bool [rows, its dropped tokens]: those that don't stand before the row

    @property
    def width(self) -> int:
        """Return the number of columns: the kept tokens before it and its own tokens."""
        return self.kept_before + self.stop - self.start


class Packed:
    """The keys or values [H, L, D] of some heads as the strips see them: kept tokens side by side, then the strip's own."""

    def __init__(self, tokens: torch.Tensor, kept: int, rows: int, dtype: torch.dtype) -> None:
        self.tokens = tokens
        self.buffer = tokens.new_empty(len(tokens), kept + rows, tokens.shape[-1], dtype=dtype)

    def enter(self, strip: Strip) -> torch.Tensor:
        """Return [H, width, D], the strip's columns."""
        columns = self.buffer[:, : strip.width]
        columns[:, strip.kept_before :] = self.tokens[:, strip.start : strip.stop]
        return columns

    def leave(self, strip: Strip) -> None:
        """Keep, of the strip's own tokens, those that are kept."""
        _pack(self.buffer, strip)


def _pack(buffer: torch.Tensor, strip: Strip) -> None:
    first = strip.kept_before
    buffer[:, first : first + len(strip.kept)] = buffer[:, first + strip.kept]


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: torch.Tensor,
    scaling: float,
    max_exponent: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Eq. 7 of query [B, H, L, D] and key, value [B, H_kv, L, D], and what the backward pass needs of it.

    `packing` is `TrainingContext.packing`; by `max_exponent` a dropped token's score may exceed the row's best kept one in the
    backward pass. The results are `out` [B, H, L, D] in the inputs' dtype and, [B, H, L] in float32 or float64, `lse` =
    log sum_j e^{x_ij} G_ij, +inf where a row sees nothing, and `cap`, the bound of x_ij - lse of a dropped token j.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = empty_output(query)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    cap = torch.empty_like(lse)
    for sample, strips in enumerate(_all_strips(packing)):
        kept = strips[-1].kept_before + len(strips[-1].kept)
        for heads, kv_heads in _head_groups(query, key):
            keys = Packed(key[sample, kv_heads], kept, _ROWS, dtype)
            values = Packed(value[sample, kv_heads], kept, _ROWS, dtype)
            members = query[sample, heads].unflatten(0, (len(keys.tokens), -1))
            for strip in strips:
                rows = slice(strip.start, strip.stop)
                scores = _rows(members, strip, dtype).mul_(scaling) @ keys.enter(strip).mT
                _hide(scores, strip)
                top = scores.amax(-1, keepdim=True)
                top.masked_fill_(top == float("-inf"), 0.0)
                weights = scores.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                nothing = total == 0
                total.masked_fill_(nothing, 1.0)
                mixed = (weights @ values.enter(strip)).div_(total)
                count, log_total = strip.stop - strip.start, total.log_()
                out[sample, heads, rows] = mixed.view(-1, count, out.shape[-1]).to(out.dtype)
                row_lse = (top + log_total).masked_fill_(nothing, float("inf"))
                lse[sample, heads, rows] = row_lse.view(-1, count)
                cap[sample, heads, rows] = (max_exponent - log_total).view(-1, count)
                keys.leave(strip)
                values.leave(strip)
    return out, lse, cap


def backward(
    upstream: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cap: torch.Tensor,
    scaling: float,
    need_keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of query, key and value in their dtypes and of the keep mask [B, L] (unless `need_keep` kept tokens' only)."""
    dtype = lse.dtype
    grad_query, grad_key, grad_value = (empty_gradient(x) for x in (query, key, value))
    grad_keep = lse.new_zeros(query.shape[0], query.shape[2])
    for sample, strips in enumerate(_all_strips(packing)):
        kinds = packing[sample, 2]
        kept = (kinds == KEPT).nonzero()[:, 0]
        dropped = (kinds == DROPPED).nonzero()[:, 0]
        for heads, kv_heads in _head_groups(query, key):
            keys = Packed(key[sample, kv_heads], len(kept), _ROWS, dtype)
            values = Packed(value[sample, kv_heads], len(kept), _ROWS, dtype)
            key_sum, value_sum = torch.zeros_like(keys.buffer), torch.zeros_like(values.buffer)
            keep_sum = lse.new_zeros(len(kept) + _ROWS)
            dropped_keys, dropped_values = (x.tokens[:, dropped].to(dtype) for x in (keys, values))
            dropped_sum = lse.new_zeros(len(dropped))
            per_group = (len(keys.tokens), -1)
            members = query[sample, heads].unflatten(0, per_group)
            above = upstream[sample, heads].unflatten(0, per_group)
            below = out[sample, heads].unflatten(0, per_group)
            for strip in strips:
                rows, width = slice(strip.start, strip.stop), strip.width
                count = strip.stop - strip.start
                queries = _rows(members, strip, dtype).mul_(scaling)
                pull_out = _rows(above, strip, dtype)
                delta = (pull_out * _rows(below, strip, dtype)).sum(-1, keepdim=True)
                row_lse = lse[sample, heads, rows].reshape(len(queries), -1, 1)
                columns = keys.enter(strip)
                scores = queries @ columns.mT
                _hide(scores, strip)
                weights = scores.sub_(row_lse).exp_()
                value_sum[:, :width].baddbmm_(weights.mT, pull_out)
                gradient = (pull_out @ values.enter(strip).mT).sub_(delta).mul_(weights)
                keep_sum[:width] += gradient.sum((0, 1))
                own = gradient.view(-1, count, width)[..., strip.kept_before :]
                keep_sum[strip.kept_before : width] -= own.diagonal(dim1=1, dim2=2).sum(0)
                grad_query[sample, heads, rows] = (
                    (gradient @ columns).mul_(scaling).view(-1, count, query.shape[-1]).to(query.dtype)
                )
                key_sum[:, :width].baddbmm_(gradient.mT, queries)
                for total, gradients in ((key_sum, grad_key), (value_sum, grad_value)):
                    gradients[sample, kv_heads, rows] = total[:, strip.kept_before : width].to(
                        gradients.dtype
                    )
                    _pack(total, strip)
                    total[:, strip.kept_before + len(strip.kept) : width] = 0
                _pack(keep_sum[None], strip)
                keep_sum[strip.kept_before + len(strip.kept) : width] = 0
                keys.leave(strip)
                values.leave(strip)
                if need_keep and strip.dropped_through:
                    seen = slice(0, strip.dropped_through)
                    weights = (queries @ dropped_keys[:, seen].mT).sub_(row_lse)
                    weights.clamp_(max=cap[sample, heads, rows].reshape(row_lse.shape)).exp_()
                    weights.view(-1, count, strip.dropped_through)[..., strip.dropped_before :].masked_fill_(
                        strip.later, 0.0
                    )
                    gradient = (pull_out @ dropped_values[:, seen].mT).sub_(delta).mul_(weights)
                    dropped_sum[seen] += gradient.sum((0, 1))
            # What the strips wrote of kept tokens was their own rows' part.
            for total, gradients in ((key_sum, grad_key), (value_sum, grad_value)):
                gradients[sample, kv_heads].index_copy_(1, kept, total[:, : len(kept)].to(gradients.dtype))
            grad_keep[sample, kept] += keep_sum[: len(kept)]
            grad_keep[sample, dropped] += dropped_sum
    return grad_query, grad_key, grad_value, grad_keep


def _all_strips(packing: torch.Tensor) -> Iterator[list[Strip]]:
    """Each sample's strips."""
    for kinds in packing[:, 2]:
        strips: list[Strip] = []
        kept = dropped = 0
        for start in range(0, len(kinds), _ROWS):
            own = kinds[start : start + _ROWS]
            places = torch.arange(len(own), device=own.device)
            itself = places[:, None] == places
            seen = (itself & (own != PADDING)) | ((own == KEPT) & (places[:, None] > places))
            its_kept, its_dropped = (own == KEPT).nonzero()[:, 0], (own == DROPPED).nonzero()[:, 0]
            strips.append(
                Strip(
                    start, start + len(own), its_kept, kept, dropped, dropped + len(its_dropped),
                    ~seen, its_dropped >= places[:, None],
                )
            )  # fmt: skip
            kept, dropped = kept + len(its_kept), dropped + len(its_dropped)
        yield strips


def _head_groups(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of query heads and of the key heads they share."""
    kv_heads, members = key.shape[1], query.shape[1] // key.shape[1]
    most = _SCORES.get(query.device.type, _SCORES_ELSEWHERE)
    step = max(1, min(kv_heads, most // (members * _ROWS * max(1, query.shape[2]))))
    for first in range(0, kv_heads, step):
        last = min(kv_heads, first + step)
        yield slice(first * members, last * members), slice(first, last)


def _rows(members: torch.Tensor, strip: Strip, dtype: torch.dtype) -> torch.Tensor:
    """A strip of [H_kv, members, L, D] as a fresh [H_kv, members * rows, D]: heads that share a key become rows of one product."""
    rows = members[:, :, strip.start : strip.stop]
    return torch.empty(rows.shape, dtype=dtype, device=rows.device).copy_(rows).flatten(1, 2)


def _hide(scores: torch.Tensor, strip: Strip) -> None:
    own = scores.view(-1, strip.stop - strip.start, strip.width)[..., strip.kept_before :]
    own.masked_fill_(strip.hidden, float("-inf"))
