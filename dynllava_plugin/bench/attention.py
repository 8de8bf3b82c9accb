"""Forward and backward of one training attention: ours, the full matrix, and SDPA's causal attention as a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from dynllava_plugin.model import attention
from dynllava_plugin.sparsity.masked_softmax import (
    PADDING,
    TrainingContext,
    context_matrix,
    masked_softmax_attention,
    plain_masked_softmax,
    training_context,
    visible_matrix,
)

IMAGE_TOKENS = 576
PROMPT_TOKENS = 35  # LLaVA-1.5's system prompt, before the image
FULL_MATRICES = (
    9  # float32 tensors of the size of all scores that the plain one holds at its peak, with a margin
)


@dataclass(frozen=True)
class AttentionCase:
    """One attention call: [batch, heads, length, head_dim], keys and values with `kv_heads`; masks that keep "paper" or "all"."""

    length: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    kept: str = "paper"
    device: str = "cpu"

    @property
    def plain_bytes(self) -> float:
        """Return the bytes that the full matrix needs beside its inputs, about."""
        return 4.0 * FULL_MATRICES * self.batch * self.heads * self.length**2

    def small(self) -> AttentionCase:
        """Return a case of the same kind that takes no time."""
        return replace(self, length=min(self.length, 64))

    def work(self, implementation: str) -> Callable[[], None]:
        """Return forward and backward by one of `IMPLEMENTATIONS`; the inputs are there already."""
        return partial(IMPLEMENTATIONS[implementation], attention_inputs(self))


class AttentionInputs(NamedTuple):
    """Leaves that want gradients, [B, H, L, D] and keep mask float32 [B, L]; `valid` bool [B, L]; the gradient of the output."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keep: torch.Tensor
    valid: torch.Tensor
    upstream: torch.Tensor


def training_keep(batch: int, length: int, kept: str, generator: torch.Generator) -> torch.Tensor:
    """Return float32 [B, L] keep masks on the CPU.

    "all" keeps every token, "paper" what the recipe's rates keep: 20% of an image's 576 tokens (fewer where the length has no room
    for so many) behind 35 of prompt, and half of the last half of the text.
    """
    keep = torch.ones(batch, length)
    if kept == "all":
        return keep
    first = min(PROMPT_TOKENS, length // 8)
    image = min(IMAGE_TOKENS, length - 2 * first)
    answer = first + image + (length - first - image) // 2
    drawn = torch.rand(batch, length, generator=generator)
    keep[:, first : first + image] = (drawn[:, first : first + image] < 0.2).float()
    keep[:, answer:] = (drawn[:, answer:] < 0.5).float()
    return keep


def attention_inputs(case: AttentionCase) -> AttentionInputs:
    """Return normal queries, keys and values in the model's layout ([B, L, H, D] in memory), without padding."""
    generator = torch.Generator().manual_seed(0)

    def tokens(heads: int) -> torch.Tensor:
        drawn = torch.randn(case.batch, case.length, heads, case.head_dim, generator=generator)
        return drawn.to(case.device, case.dtype).transpose(1, 2)

    return AttentionInputs(
        query=tokens(case.heads).requires_grad_(),
        key=tokens(case.kv_heads).requires_grad_(),
        value=tokens(case.kv_heads).requires_grad_(),
        keep=training_keep(case.batch, case.length, case.kept, generator).to(case.device).requires_grad_(),
        valid=torch.ones(case.batch, case.length, dtype=torch.bool, device=case.device),
        upstream=tokens(case.heads),
    )


def ours(inputs: AttentionInputs) -> None:
    """Run the package's attention, its packing included."""
    query, key, value, keep, valid, upstream = inputs
    out = masked_softmax_attention(query, key, value, training_context(keep, valid), query.shape[-1] ** -0.5)
    torch.autograd.grad(out, inputs[:4], upstream)


def plain(inputs: AttentionInputs) -> None:
    """Run the full matrix, its masks included."""
    query, key, value, keep, valid, upstream = inputs
    context, visible = context_matrix(keep), visible_matrix(valid)
    out = plain_masked_softmax(query, key, value, context, visible, query.shape[-1] ** -0.5)
    torch.autograd.grad(out, inputs[:4], upstream)


def sdpa(inputs: AttentionInputs) -> None:
    """Run causal attention over all tokens, without masks to learn, as a layer before l does."""
    query, key, value, _, _, upstream = inputs
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    torch.autograd.grad(out, inputs[:3], upstream)


IMPLEMENTATIONS: dict[str, Callable[[AttentionInputs], None]] = {"plain": plain, "ours": ours, "sdpa": sdpa}


@contextmanager
def model_attention(implementation: str) -> Iterator[None]:
    """Let the model's training run "ours" or "plain", whose two masks are made once a forward pass as they are for every layer."""
    last: list[Any] = [None, None]

    def plain_forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: TrainingContext, scaling: float
    ) -> torch.Tensor:
        if last[0] is not context:
            valid = context.packing[:, 2] != PADDING
            last[:] = context, (context_matrix(context.keep), visible_matrix(valid))
        context_of, visible = last[1]
        return plain_masked_softmax(query, key, value, context_of, visible, scaling)

    if implementation == "plain":
        attention.masked_softmax_attention = plain_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.masked_softmax_attention = masked_softmax_attention
