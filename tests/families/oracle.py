"""A slow oracle of token reduction on a stock model: one sample, no cache, dropped tokens masked and never removed.

Positions, deepstack features and everything else are the stock model's own; only the attention masks of its decoder
layers are replaced. It shares no code with the package. Inputs are what `sample_of` returns, with tokens appended by
`with_tokens`; a policy's decision can be computed from `hidden_at` and `attention_at` by other code than the package's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Keeps = Mapping[int, Tensor]


def decoder(stock: PreTrainedModel) -> nn.Module:
    """The text model of a stock VLM: `.layers` are its decoder layers."""
    return stock.get_submodule("model.language_model")


def with_tokens(inputs: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    """One sample's inputs with `tokens` behind its text: an answer, or what was generated so far."""
    ids = inputs["input_ids"]
    more = torch.tensor([tokens], dtype=ids.dtype, device=ids.device)
    longer = {**inputs, "input_ids": torch.cat([ids, more], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
    return longer


def visible(length: int, layer: int, keeps: Keeps) -> Tensor:
    """[L, L] bool: the columns that each row of `layer` sees, the kept ones before it and itself.

    A column dropped at a gate is invisible in the layer of that gate and in all that follow.
    """
    columns = torch.ones(length, dtype=torch.bool)
    for gate, keep in keeps.items():
        assert keep.shape == (length,) and keep.dtype == torch.bool, (
            f"the gate at {gate} wants [{length}] bool"
        )
        if gate <= layer:
            columns = columns & keep.cpu()
    return torch.ones(length, length, dtype=torch.bool).tril() & columns | torch.eye(length, dtype=torch.bool)


@torch.no_grad()
def oracle_logits(
    stock: PreTrainedModel,
    inputs: dict[str, Any],
    gate_layer: int | None = None,
    keep: Tensor | None = None,
    keeps: Keeps | None = None,
) -> Tensor:
    """Logits [L, V] of one sample where the layers from each gate on see kept columns and themselves only.

    One gate: `gate_layer` and `keep` [L] bool. Several: `keeps` = {layer: [L] bool}.
    """
    if keeps is None:
        keeps = {} if gate_layer is None or keep is None else {gate_layer: keep}
    with _masked(stock, inputs, keeps):
        return stock(**inputs, use_cache=False).logits[0]


@torch.no_grad()
def oracle_tokens(stock: PreTrainedModel, inputs: dict[str, Any], keeps: Keeps, count: int) -> list[int]:
    """`count` greedy tokens, each from a call over everything before it; the end-of-text token doesn't stop it.

    `keeps` are over the prompt: tokens decoded behind it stay.
    """
    tokens: list[int] = []
    for _ in range(count):
        stay = torch.ones(len(tokens), dtype=torch.bool)
        grown = {gate: torch.cat([keep, stay]) for gate, keep in keeps.items()}
        logits = oracle_logits(stock, with_tokens(inputs, tokens), keeps=grown)
        tokens.append(int(logits[-1].argmax()))
    return tokens


@torch.no_grad()
def hidden_at(
    stock: PreTrainedModel, inputs: dict[str, Any], layer: int, keeps: Keeps | None = None
) -> Tensor:
    """Hidden states [L, D] that enter `layer`, or the final norm where `layer` is the number of layers."""
    layers, seen = decoder(stock).layers, []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    module = layers[layer] if layer < len(layers) else decoder(stock).norm
    with (
        _masked(stock, inputs, keeps or {}),
        _hooked(module.register_forward_pre_hook(look, with_kwargs=True)),
    ):
        stock(**inputs, use_cache=False)
    return seen[0][0]


@torch.no_grad()
def attention_at(
    stock: PreTrainedModel, inputs: dict[str, Any], layer: int, keeps: Keeps | None = None
) -> Tensor:
    """Attention [heads, L, L] of `layer`: row i is what token i gives to each column, a sum of one."""
    seen = []

    def look(module: nn.Module, args: tuple, output: tuple) -> None:
        seen.append(output[1])

    attention = decoder(stock).layers[layer].self_attn
    with _masked(stock, inputs, keeps or {}), _hooked(attention.register_forward_hook(look)):
        stock(**inputs, use_cache=False)
    return seen[0][0]


def last_row_attention(
    stock: PreTrainedModel, inputs: dict[str, Any], layer: int, keeps: Keeps | None = None
) -> Tensor:
    """Attention [heads, L] that the last token gives in `layer`."""
    return attention_at(stock, inputs, layer, keeps)[:, -1]


@contextmanager
def _masked(stock: PreTrainedModel, inputs: dict[str, Any], keeps: Keeps) -> Iterator[None]:
    """Eager attention, and every decoder layer's mask replaced by `visible`'s as an additive one [1, 1, L, L]."""
    batch, length = inputs["input_ids"].shape
    assert batch == 1 and bool(inputs["attention_mask"].all()), "the oracle takes one sample without padding"
    layers = decoder(stock).layers
    assert all(0 <= gate < len(layers) for gate in keeps), "a gate outside the model"
    before = stock.config._attn_implementation
    stock.set_attn_implementation("eager")
    try:
        with ExitStack() as hooks:
            for number, layer in enumerate(layers):
                mask = torch.zeros(length, length, dtype=stock.dtype)
                mask.masked_fill_(~visible(length, number, keeps), torch.finfo(stock.dtype).min)
                hook = layer.register_forward_pre_hook(
                    _replace(mask[None, None].to(stock.device)), with_kwargs=True
                )
                hooks.enter_context(_hooked(hook))
            yield
    finally:
        stock.set_attn_implementation(before)


def _replace(mask: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert "attention_mask" in kwargs, "this layer takes its mask in another way"
        return args, {**kwargs, "attention_mask": mask}

    return hook


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
