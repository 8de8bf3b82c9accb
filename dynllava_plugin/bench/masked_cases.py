"""Inputs for one call of the training attention: random queries, keys and values, and masks as training has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IMAGE_TOKENS = 576
PROMPT_TOKENS = 35  # LLaVA-1.5's system prompt, before the image


@dataclass(frozen=True)
class AttentionShape:
    """One attention call: [batch, heads, length, head_dim], keys and values with `kv_heads`."""

    length: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32


@dataclass
class AttentionInputs:
    """Leaves that want gradients, and the gradient of the output."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keep: torch.Tensor
    valid: torch.Tensor
    upstream: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.key, self.value, self.keep


def training_keep(batch: int, length: int, kept: str, generator: torch.Generator) -> torch.Tensor:
    """float32 [B, L] keep masks on the CPU.

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


def attention_inputs(
    shape: AttentionShape,
    kept: str,
    device: torch.device | str,
    seed: int = 0,
    padding: tuple[int, int] = (0, 0),
) -> AttentionInputs:
    """Normal queries, keys and values in the model's layout ([B, L, H, D] in memory).

    `padding` is how many tokens of each sample but the first are padding on the left and on the right.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(heads: int) -> torch.Tensor:
        drawn = torch.randn(shape.batch, shape.length, heads, shape.head_dim, generator=generator)
        return drawn.to(device, shape.dtype).transpose(1, 2)

    valid = torch.ones(shape.batch, shape.length, dtype=torch.bool)
    valid[1:, : padding[0]] = False
    valid[1:, shape.length - padding[1] :] = False
    keep = training_keep(shape.batch, shape.length, kept, generator)
    return AttentionInputs(
        query=tokens(shape.heads).requires_grad_(),
        key=tokens(shape.kv_heads).requires_grad_(),
        value=tokens(shape.kv_heads).requires_grad_(),
        keep=keep.to(device).requires_grad_(),
        valid=valid.to(device),
        upstream=tokens(shape.heads),
    )
