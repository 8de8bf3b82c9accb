"""What transformers has to know of a family, so that `Auto*` classes find it once the package is imported."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

FAMILIES: dict[str, Any] = {}  # stock model_type -> our class


def register_family(model: Any, stock_config: Any) -> None:
    """Register a family's class, and that its checkpoints' keys are renamed as the stock ones'."""
    config = model.config_class
    AutoConfig.register(config.model_type, config)
    if model.model_class.config_class is config:
        AutoModel.register(config, model.model_class)
    AutoModelForImageTextToText.register(config, model)
    renames = get_checkpoint_conversion_mapping(stock_config.model_type)
    if renames:
        register_checkpoint_conversion_mapping(config.model_type, renames, overwrite=True)
    FAMILIES[stock_config.model_type] = model
