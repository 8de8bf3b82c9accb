"""Dynamic-LLaVA on current transformers: train it, evaluate it in lmms-eval and VLMEvalKit, read the tables.

Importing this package is enough for `AutoConfig`, `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline` to read
its checkpoints. Its names are imported at their first use: until then it takes neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynllava_plugin.auto_classes import register_at_first_use

if TYPE_CHECKING:
    from dynllava_plugin.model.checkpoints import load_model
    from dynllava_plugin.model.conversation import Conversation
    from dynllava_plugin.model.families.llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
    from dynllava_plugin.sparsity.config import SparsityConfig
    from dynllava_plugin.visualize.explain import explain

__version__ = "0.1.0"
__all__ = [
    "Conversation",
    "DynamicLlavaConfig",
    "DynamicLlavaForConditionalGeneration",
    "SparsityConfig",
    "explain",
    "load_model",
]

_MODULES = {
    "Conversation": "model.conversation",
    "DynamicLlavaConfig": "model.families.llava",
    "DynamicLlavaForConditionalGeneration": "model.families.llava",
    "SparsityConfig": "sparsity.config",
    "explain": "visualize.explain",
    "load_model": "model.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_at_first_use()
