"""Configurations: a family's stock ones, with the sparsification's settings inside the LLM's part."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from dynllava_plugin.errors import UserError
from dynllava_plugin.sparsity.config import SparsityConfig

PREFIX = "dynamic_"
TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {}  # stock model_type of an LLM -> ours


class SparseTextConfig:
    """To stand before a stock text config in a class's bases, which declares ``sparsity: Any = None``."""

    sparsity: Any

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.sparsity is None:
            self.sparsity = fresh_sparsity(self.hidden_size)  # type: ignore[attr-defined]
        elif isinstance(self.sparsity, dict):
            self.sparsity = SparsityConfig.from_dict(self.sparsity)

    def to_dict(self) -> dict[str, Any]:
        """Return the config JSON-ready; `sparsity` as a plain dict."""
        return {**super().to_dict(), "sparsity": self.sparsity.to_dict()}  # type: ignore[misc]


class SparseVLMConfig:
    """To stand before a family's stock config in a class's bases: its LLM's part becomes one with `sparsity`.

    Raises `UserError` for an LLM of a kind that isn't supported.
    """

    model_type: str
    text_config: Any

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.text_config = sparse_text_config(self.text_config)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return what the stock config's does, of the stock family's config.json too, and of no other family's."""
        found = config_dict.get("model_type", cls.model_type)
        if found not in (cls.model_type, cls.model_type.removeprefix(PREFIX)):
            raise UserError(
                f"config.json: model_type {found!r} is not of {cls.__name__}; dynllava_plugin.load_model finds the class"
            )
        values = {key: value for key, value in config_dict.items() if key != "model_type"}
        return super().from_dict(values, **kwargs)  # type: ignore[misc]

    @property
    def sparsity(self) -> SparsityConfig:
        """Return the settings in force; change them through `model.set_sparsity(...)`."""
        return self.text_config.sparsity

    @property
    def placeholders(self) -> slice:
        """Return the rows of the vocabulary that were never trained; no family but LLaVA-1.5 has any."""
        return slice(0, 0)


def text_config_class(model_type: str) -> type[PreTrainedConfig]:
    """Return our config of an LLM by its stock model_type; `UserError` for a kind that isn't supported."""
    if model_type not in TEXT_CONFIGS:
        raise UserError(
            f"text_config: the LLM is a {model_type}, supported are {', '.join(sorted(TEXT_CONFIGS))}"
        )
    return TEXT_CONFIGS[model_type]


def sparse_text_config(stock: Any) -> Any:
    """Return a stock text config as the one with `sparsity`; one that has it already as it is."""
    if isinstance(stock, SparseTextConfig):
        return stock
    values = stock.to_dict()
    return text_config_class(values.pop("model_type")).from_dict(values)


def check_layers(config: Any) -> None:
    """Raise `UserError` for a text config with layers that see a window of the context only, or a gate outside the model."""
    config.sparsity.validate(config.num_hidden_layers)
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    windowed = window is not None if types is None else any(kind != "full_attention" for kind in types)
    if windowed and (window is None or window < config.max_position_embeddings):
        raise UserError(
            f"sliding_window: {window}: layers that see a part of the context only are not supported; "
            "a checkpoint without a window (null) is"
        )


def fresh_sparsity(hidden_size: int) -> SparsityConfig:
    """Return settings for a checkpoint without predictors: the paper's, with predictors that fit a small LLM.

    The paper's width 512 (8 heads, MLP 2048) from `hidden_size` 1024 on; below, the largest power of two up
    to half of `hidden_size` (at least 16), 4 heads and an MLP of four times the width: 192 -> 64.
    """
    if hidden_size >= 1024:
        return SparsityConfig()
    width = max(16, 2 ** ((hidden_size // 2).bit_length() - 1))
    return SparsityConfig(predictor_dim=width, predictor_heads=4, predictor_ffn_dim=4 * width)


def dynamic(stock: Any, mixin: type, module: str, what: str, **facts: Any) -> Any:
    """Return `DynamicX`, in `module`, of a stock class X with a `mixin` (object: none) before it and `facts` inside.

    Its docstring is "X `what`.".
    """
    facts |= {"__doc__": f"{stock.__name__} {what}.", "__module__": module}
    bases = (stock,) if mixin is object else (mixin, stock)
    return type(f"Dynamic{stock.__name__}", bases, facts)
