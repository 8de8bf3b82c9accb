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

from dynllava_plugin.flops import DecoderShape, logits_flops, token_flops


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
class CachedDecoder:
    """A decoder and what its cache holds where.

    Attributes
    ----------
    shape : DecoderShape
    sparse_layer : int
        l: layers from l on hold the kept tokens only.
    itemsize : int
        Bytes of a number in the cache.
    """

    shape: DecoderShape
    sparse_layer: int
    itemsize: int

    @classmethod
    def of(cls, model: Any) -> CachedDecoder:
        """The decoder of a loaded model."""
        shape = DecoderShape.of(model.config.text_config)
        return cls(shape, model.config.sparsity.sparse_layer, model.dtype.itemsize)


def output_cost(decoder: CachedDecoder, dense: int, sparse: int, keep: Sequence[bool]) -> OutputCost:
    """The cost of output tokens behind a context.

    Parameters
    ----------
    decoder : CachedDecoder
    dense, sparse : int
        Tokens of context in layers < l and in layers >= l before the first output token.
    keep : sequence of bool [T]
        For each output token that was fed, whether layers >= l hold it.
    """
    shape = decoder.shape
    below, above = decoder.sparse_layer, shape.layers - decoder.sparse_layer
    flops = flops_kept = 0.0
    for stays in keep:
        dense += 1
        seen = sparse + 1  # a token always attends to itself
        first = token_flops(shape, below, dense)
        rest = token_flops(shape, above, seen) + logits_flops(shape)
        flops += first + rest
        flops_kept += first + rest * stays
        sparse += stays
    held = below * len(keep) + above * sum(keep)
    return OutputCost(held * shape.kv_bytes(decoder.itemsize), flops, flops_kept)
