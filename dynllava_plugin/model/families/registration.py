"""What transformers has to know of a family, so that `Auto*` classes find it once the package is imported."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from dynllava_plugin.model.configuration import PREFIX, TEXT_CONFIGS, SparseVLMConfig, dynamic
from dynllava_plugin.model.families import text_models  # noqa: F401  (LLMs are looked up by config)
from dynllava_plugin.model.modeling import SparseVLM

FAMILIES: dict[str, Any] = {}  # stock model_type -> our class


def plain_family(
    stock_config: Any, stock: Any, stock_model: Any, module: str, mixin: type = SparseVLM, **facts: Any
) -> tuple[Any, Any]:
    """Return our config and class, in `module`, of a family that needs nothing of its own but `mixin` and `facts`.

    Of Mistral3's they are called `DynamicMistral3Config` and `DynamicMistral3ForConditionalGeneration`; both are registered.
    """
    parts = dict(stock_config.sub_configs_defaults)
    llm: Any = getattr(parts["text_config"].config_class, "model_type", None)  # where it is of one kind only
    parts["text_config"] = TEXT_CONFIGS.get(llm, parts["text_config"])
    config = dynamic(
        stock_config, SparseVLMConfig, module, "with `sparsity`",
        model_type=PREFIX + stock_config.model_type, sub_configs_defaults=parts,
    )  # fmt: skip
    model = dynamic(
        stock, mixin, module, "with gates between its LLM's layers",
        config_class=config, model_class=stock_model, **facts,
    )  # fmt: skip
    register_family(model, stock_config)
    return config, model


def with_llm(stock_model: Any, llm: Any, module: str) -> Any:
    """Return `DynamicX`, in `module`, of a stock model X that names its text model's class itself, around our class `llm`."""

    def __init__(self: Any, config: Any) -> None:
        stock_model.__init__(self, config)
        self.language_model = llm._from_config(config.text_config)
        self.post_init()

    return dynamic(stock_model, object, module, f"around {llm.__name__}", __init__=__init__)


def register_family(model: Any, stock_config: Any) -> None:
    """Register a family's class, and that its checkpoints' keys are renamed as the stock ones'."""
    config = model.config_class
    AutoConfig.register(config.model_type, config)
    # `AutoModel.register` wants a class that names our config.
    AutoModel._model_mapping.register(config, model.model_class)
    AutoModelForImageTextToText.register(config, model)
    AutoModelForMultimodalLM.register(config, model)
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
