"""What output text costs: KV-cache bytes at the end and FLOPs of decoding, from which tokens stayed.

Two counts of FLOPs, because the paper's Table 3 and what a decoder executes differ:

* `flops`: what is executed. Every output token passes all layers (it has to predict its successor); in layers
  >= l it attends only to what stayed.
* `flops_kept`: a token counts in layers >= l only if it stays as context. The paper's figures fall with the
  keep rate (2.75 to 1.52 TFLOPs at 0.61 of the cache), which only this count does.

A multiplication with its addition is two operations. Embeddings, norms and the predictors are left out
(together below one percent); the vocabulary projection is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OutputCost:
    """Of the output tokens of one sample.

    Attributes
    ----------
    kv_bytes : int
        Keys and values that the output tokens add to the cache, all layers, in the model's dtype.
    flops, flops_kept : float
        See the module.
    """

    kv_bytes: int
    flops: float
    flops_kept: float

    def __add__(self, other: OutputCost) -> OutputCost:
        return OutputCost(
            self.kv_bytes + other.kv_bytes, self.flops + other.flops, self.flops_kept + other.flops_kept
        )


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama decoder that decide what a token costs.

    Attributes
    ----------
    layers, sparse_layer : int
        L, and l: layers from l on hold the kept tokens only.
    hidden, intermediate, heads, kv_heads, head_dim, vocabulary : int
    bytes_per_value : int
        Of the cache's dtype.
    """

    layers: int
    sparse_layer: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    bytes_per_value: int

    @classmethod
    def of(cls, model: Any) -> DecoderShape:
        """The decoder's shape of a loaded model."""
        config = model.config.text_config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            sparse_layer=model.config.sparsity.sparse_layer,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocabulary=config.vocab_size,
            bytes_per_value=model.dtype.itemsize,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.bytes_per_value

    @property
    def layer_flops(self) -> int:
        """One token through one layer's projections and MLP, without attention's products."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    @property
    def attention_flops(self) -> int:
        """One token attending to one other (or itself) in one layer: scores and weighted values."""
        return 4 * self.heads * self.head_dim


def output_cost(shape: DecoderShape, dense: int, sparse: int, keep: Sequence[bool]) -> OutputCost:
    """The cost of output tokens behind a context.

    Parameters
    ----------
    shape : DecoderShape
    dense, sparse : int
        Tokens of context in layers < l and in layers >= l before the first output token.
    keep : sequence of bool [T]
        For each output token that was fed, whether layers >= l hold it.
    """
    below, above = shape.sparse_layer, shape.layers - shape.sparse_layer
    kept = sum(keep)
    flops = flops_kept = 0.0
    for stays in keep:
        dense += 1
        seen = sparse + 1  # a token always attends to itself
        both = shape.layers * shape.layer_flops + 2 * shape.hidden * shape.vocabulary
        flops += both + shape.attention_flops * (below * dense + above * seen)
        here = below * (shape.layer_flops + shape.attention_flops * dense)
        if stays:
            sparse += 1
            here += above * (shape.layer_flops + shape.attention_flops * seen)
            here += 2 * shape.hidden * shape.vocabulary
        flops_kept += here
    held = below * len(keep) + above * kept
    return OutputCost(held * shape.kv_bytes_per_token, flops, flops_kept)
