"""Reading a checkpoint of any layout (see `layouts`) as a Dynamic-LLaVA."""

from dynllava_plugin.model.checkpoints.loading import (
    check_settings,
    load_model,
    load_to_train,
    load_without_processor,
)

__all__ = ["check_settings", "load_model", "load_to_train", "load_without_processor"]
