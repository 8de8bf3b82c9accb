"""Forward and backward of one attention: ours, the full matrix, and SDPA's causal attention as a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from dynllava_plugin.bench.masked_cases import AttentionInputs, AttentionShape
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

FULL_MATRICES = 9  # float32 tensors of the size of all scores that the plain implementation holds at its peak, with a margin


def ours(inputs: AttentionInputs) -> None:
    """The package's attention, its packing included."""
    context = training_context(inputs.keep, inputs.valid)
    out = masked_softmax_attention(
        inputs.query, inputs.key, inputs.value, context, inputs.query.shape[-1] ** -0.5
    )
    torch.autograd.grad(out, inputs.leaves, inputs.upstream)


def plain(inputs: AttentionInputs) -> None:
    """The full matrix, its masks included."""
    context, visible = context_matrix(inputs.keep), visible_matrix(inputs.valid)
    scaling = inputs.query.shape[-1] ** -0.5
    out = plain_masked_softmax(inputs.query, inputs.key, inputs.value, context, visible, scaling)
    torch.autograd.grad(out, inputs.leaves, inputs.upstream)


def sdpa(inputs: AttentionInputs) -> None:
    """Causal attention over all tokens, without masks to learn: what a layer before l runs."""
    out = functional.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=True,
        enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
    )
    torch.autograd.grad(out, inputs.leaves[:3], inputs.upstream)


IMPLEMENTATIONS: dict[str, Callable[[AttentionInputs], None]] = {"plain": plain, "ours": ours, "sdpa": sdpa}


def plain_bytes(shape: AttentionShape) -> float:
    """What the plain implementation needs beside its inputs, about."""
    return 4.0 * FULL_MATRICES * shape.batch * shape.heads * shape.length**2


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
        matrix, visible = last[1]
        return plain_masked_softmax(query, key, value, matrix, visible, scaling)

    if implementation == "plain":
        attention.masked_softmax_attention = plain_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.masked_softmax_attention = masked_softmax_attention
