"""What transformers has to know of a family, so that `Auto*` classes find it once the package is imported."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from dynllava_plugin.model.families import text_models  # noqa: F401  (LLMs are looked up by config)

FAMILIES: dict[str, Any] = {}  # stock model_type -> our class


def register_family(model: Any, stock_config: Any) -> None:
    """Register a family's class, and that its checkpoints' keys are renamed as the stock ones'."""
    config = model.config_class
    AutoConfig.register(config.model_type, config)
    AutoModel._model_mapping.register(
        config, model.model_class
    )  # `register` wants a class that names our config
    AutoModelForImageTextToText.register(config, model)
    _rename_as(config.model_type, stock_config.model_type)
    for ours in (model, model.model_class):
        stock = next(base for base in ours.__mro__ if base.__module__.startswith("transformers.models."))
        if stock is not ours:
            _rename_as(ours.__name__, stock.__name__)
    FAMILIES[stock_config.model_type] = model


def _rename_as(ours: str, stock: str) -> None:
    """Give a class or model_type of ours the renames that transformers has for a stock one."""
    renames = get_checkpoint_conversion_mapping(stock)
    if renames:
        register_checkpoint_conversion_mapping(ours, renames, overwrite=True)
