"""What a call must compute and read: FLOPs by the paper's Eq. 13 and by exact count, bytes of a decode step, ideal speed-ups.

A multiply-add is two FLOPs. Eq. 13 counts 32 N C^2 + 4 N^2 C a layer (a feed-forward part of three 4C-wide matrices, attention
over all pairs, image tokens only); the exact count takes the shape's real matrices, causal pairs only, every token, the
predictors and the logits. The vision tower is in neither: it costs every mode the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama decoder with the two predictors.

    Parameters
    ----------
    layers, hidden, intermediate, heads, kv_heads, vocab : int
        L, d, width of the gated MLP, query heads, key/value heads, rows of the output matrix.
    predictor_dim, predictor_ffn_dim, predictor_layers : int
        Width c, MLP width and ViT blocks of the image predictor; the text predictor shares c.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    predictor_dim: int = 512
    predictor_ffn_dim: int = 2048
    predictor_layers: int = 2

    @classmethod
    def of(cls, text_config: Any) -> DecoderShape:
        """The sizes in a `DynamicLlamaConfig`."""
        sparsity = text_config.sparsity
        return cls(
            text_config.num_hidden_layers,
            text_config.hidden_size,
            text_config.intermediate_size,
            text_config.num_attention_heads,
            text_config.num_key_value_heads,
            text_config.vocab_size,
            sparsity.predictor_dim,
            sparsity.predictor_ffn_dim,
            sparsity.predictor_layers,
        )

    @property
    def kv_width(self) -> int:
        """Width of a key or value of all heads."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_width
        return attention + 3 * self.hidden * self.intermediate

    @property
    def image_predictor_parameters(self) -> int:
        """Weights of the image predictor's matrices."""
        c = self.predictor_dim
        return (
            self.hidden * c + self.predictor_layers * (4 * c * c + 2 * c * self.predictor_ffn_dim) + _head(c)
        )

    @property
    def text_predictor_parameters(self) -> int:
        """Weights of the text predictor's matrices."""
        return self.hidden * self.predictor_dim + _head(self.predictor_dim)

    @property
    def parameters(self) -> int:
        """Weights of the decoder, its embeddings, its output matrix and both predictors (biases and norms left out)."""
        layers = self.layers * self.layer_parameters + 2 * self.vocab * self.hidden
        return layers + self.image_predictor_parameters + self.text_predictor_parameters

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.kv_width * itemsize


class Segment(NamedTuple):
    """A run of layers with one context: its prompt tokens, the share of the output that stays, and what its cache holds of both."""

    layers: int
    prompt: float
    text_keep: float
    held_share: float
    held_output_share: float

    def held(self, generated: float) -> float:
        """Tokens in one layer's cache after `generated` output tokens."""
        return self.held_share * self.prompt + self.held_output_share * self.text_keep * generated


@dataclass(frozen=True)
class Context:
    """What a mode leaves to layers from `split` on.

    Parameters
    ----------
    split : int
        First layer with a reduced context; the number of layers where nothing is dropped.
    images : int
        Image tokens before `split`.
    kept_images : int
        Image tokens from `split` on.
    text : int
        Prompt text tokens, kept in every layer.
    text_keep : float
        Share of the output tokens that stay as context from `split` on.
    image_predictor, text_predictor : bool
        Whether the predictors run.
    held_share, held_output_share : float
        Share of the prompt's and of the output tokens fed to layers from `split` on that their cache holds: a policy may let
        tokens go again.
    later : tuple of (layer, image tokens, text_keep)
        Further gates: what layers from `layer` on see instead of `kept_images` and `text_keep`.
    """

    split: int
    images: int
    kept_images: int
    text: int
    text_keep: float = 1.0
    image_predictor: bool = False
    text_predictor: bool = False
    held_share: float = 1.0
    held_output_share: float = 1.0
    later: tuple[tuple[int, float, float], ...] = ()

    @property
    def prompt(self) -> int:
        """Prompt tokens of the first layers."""
        return self.images + self.text

    def kept(self, generated: float) -> float:
        """Tokens fed to layers from `split` on that stay as context, after `generated` output tokens."""
        return self.kept_images + self.text + self.text_keep * generated

    def segments(self, layers: int) -> list[Segment]:
        """What each run of layers between two gates sees."""
        before = Segment(self.split, self.prompt, 1.0, 1.0, 1.0)
        starts = [(self.split, self.kept_images, self.text_keep), *self.later]
        ends = [start for start, _, _ in starts[1:]] + [layers]
        return [before] + [
            Segment(end - start, images + self.text, text_keep, self.held_share, self.held_output_share)
            for (start, images, text_keep), end in zip(starts, ends, strict=True)
        ]

    def held(self, layers: int, generated: float) -> float:
        """Tokens held, summed over `layers` layers, after `generated` output tokens."""
        return sum(part.layers * part.held(generated) for part in self.segments(layers))


def paper_prefill_flops(shape: DecoderShape, context: Context, batch: int = 1) -> float:
    """Eq. 13 over image tokens, as the paper's tables count: 32 B N C^2 + 4 B N^2 C a layer."""

    def layer(tokens: float) -> float:
        return 32.0 * tokens * shape.hidden**2 + 4.0 * tokens**2 * shape.hidden

    return batch * sum(
        part.layers * layer(part.prompt - context.text) for part in context.segments(shape.layers)
    )


def prefill_flops(shape: DecoderShape, context: Context, batch: int = 1) -> float:
    """Exact count of a prompt's prefill with logits for the last token."""
    return batch * _pass_flops(shape, context, 0)


def uncached_step_flops(shape: DecoderShape, context: Context, generated: int, batch: int = 1) -> float:
    """Exact count of the step without cache that follows `generated` output tokens.

    The last token is computed in every layer; of the output tokens before it only the kept ones from `split` on.
    """
    if not generated:
        return prefill_flops(shape, context, batch)
    return batch * _pass_flops(shape, context, generated)


def token_flops(shape: DecoderShape, layers: int, seen: float) -> float:
    """One token through `layers` layers in which it attends to `seen` tokens, itself included."""
    return layers * (2.0 * shape.layer_parameters + 4.0 * shape.hidden * seen)


def logits_flops(shape: DecoderShape) -> float:
    """One token's logits."""
    return 2.0 * shape.hidden * shape.vocab


def decode_step_flops(shape: DecoderShape, context: Context, generated: int, batch: int = 1) -> float:
    """Exact count of the step that feeds output token number `generated` + 1 behind a cache."""
    layers = sum(
        token_flops(shape, part.layers, part.held(generated) + 1) for part in context.segments(shape.layers)
    )
    predictor = 2.0 * shape.text_predictor_parameters if context.text_predictor else 0.0
    return batch * (layers + logits_flops(shape) + predictor)


def decode_step_weights(shape: DecoderShape, text_predictor: bool) -> int:
    """Weights that a decode step reads, whatever its batch and context."""
    weights = shape.layers * shape.layer_parameters + shape.vocab * shape.hidden
    return weights + (shape.text_predictor_parameters if text_predictor else 0)


def cache_bytes(
    shape: DecoderShape, context: Context, generated: int, itemsize: int, batch: int = 1
) -> float:
    """Bytes of the keys and values that must be held after `generated` output tokens."""
    return batch * context.held(shape.layers, generated) * shape.kv_bytes(itemsize)


def _head(dim: int) -> int:
    return dim * dim // 2 + dim * dim // 8 + dim // 4 * 2


def _pass_flops(shape: DecoderShape, context: Context, generated: int) -> float:
    """The last output token is computed in every layer, those before it where they stay."""
    total = logits_flops(shape)
    for part in context.segments(shape.layers):
        output = part.text_keep * (generated - 1) + 1 if generated else 0
        total += part.layers * _layer_flops(shape, part.prompt + output)
    if context.image_predictor:
        total += 2.0 * context.images * shape.image_predictor_parameters
        total += shape.predictor_layers * 4.0 * context.images**2 * shape.predictor_dim
    if context.text_predictor:
        total += 2.0 * generated * shape.text_predictor_parameters
    return total


def _layer_flops(shape: DecoderShape, tokens: float) -> float:
    pairs = tokens * (tokens + 1) / 2
    return 2.0 * tokens * shape.layer_parameters + 4.0 * shape.hidden * pairs


@dataclass(frozen=True)
class OutputCost:
    """What the output tokens of one sample cost to decode and to hold.

    Two counts of FLOPs, because the paper's Table 3 and what a decoder executes differ.

    Attributes
    ----------
    kv_bytes : int
        Keys and values that the output tokens add to the cache, all layers, in the model's dtype.
    flops : float
        What is executed: every output token passes all layers (it has to predict its successor); in layers >= l it attends
        only to what stayed.
    flops_kept : float
        A token counts in layers >= l only if it stays as context. The paper's figures fall with the keep rate (2.75 to 1.52
        TFLOPs at 0.61 of the cache), which only this count does.
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
        """Return the decoder of a loaded model."""
        shape = DecoderShape.of(model.config.text_config)
        return cls(shape, model.config.sparsity.sparse_layer, model.dtype.itemsize)


def output_cost(decoder: CachedDecoder, dense: int, sparse: int, keep: Sequence[bool]) -> OutputCost:
    """Return the cost of output tokens behind a context; of FLOPs the vocabulary projection is counted too.

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
