"""Forward and backward of one training attention: ours, the full matrix, and SDPA's causal attention as a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
class AttentionShape:
    """One attention call: [batch, heads, length, head_dim], keys and values with `kv_heads`."""

    length: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def plain_bytes(self) -> float:
        """Return the bytes that the full matrix needs beside its inputs, about."""
        return 4.0 * FULL_MATRICES * self.batch * self.heads * self.length**2


@dataclass
class AttentionInputs:
    """Leaves that want gradients, [B, H, L, D] and keep mask float32 [B, L], and the gradient of the output."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keep: torch.Tensor
    valid: torch.Tensor
    upstream: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """Return what gets a gradient."""
        return self.query, self.key, self.value, self.keep

    @property
    def scaling(self) -> float:
        """Return the factor of the scores."""
        return self.query.shape[-1] ** -0.5


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


def attention_inputs(shape: AttentionShape, kept: str, device: torch.device | str) -> AttentionInputs:
    """Return normal queries, keys and values in the model's layout ([B, L, H, D] in memory), without padding."""
    generator = torch.Generator().manual_seed(0)

    def tokens(heads: int) -> torch.Tensor:
        drawn = torch.randn(shape.batch, shape.length, heads, shape.head_dim, generator=generator)
        return drawn.to(device, shape.dtype).transpose(1, 2)

    return AttentionInputs(
        query=tokens(shape.heads).requires_grad_(),
        key=tokens(shape.kv_heads).requires_grad_(),
        value=tokens(shape.kv_heads).requires_grad_(),
        keep=training_keep(shape.batch, shape.length, kept, generator).to(device).requires_grad_(),
        valid=torch.ones(shape.batch, shape.length, dtype=torch.bool, device=device),
        upstream=tokens(shape.heads),
    )


def ours(inputs: AttentionInputs) -> None:
    """Run the package's attention, its packing included."""
    context = training_context(inputs.keep, inputs.valid)
    out = masked_softmax_attention(inputs.query, inputs.key, inputs.value, context, inputs.scaling)
    torch.autograd.grad(out, inputs.leaves, inputs.upstream)


def plain(inputs: AttentionInputs) -> None:
    """Run the full matrix, its masks included."""
    context, visible = context_matrix(inputs.keep), visible_matrix(inputs.valid)
    out = plain_masked_softmax(inputs.query, inputs.key, inputs.value, context, visible, inputs.scaling)
    torch.autograd.grad(out, inputs.leaves, inputs.upstream)


def sdpa(inputs: AttentionInputs) -> None:
    """Run causal attention over all tokens, without masks to learn, as a layer before l does."""
    grouped = inputs.query.shape[1] != inputs.key.shape[1]
    out = functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=grouped
    )
    torch.autograd.grad(out, inputs.leaves[:3], inputs.upstream)


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
