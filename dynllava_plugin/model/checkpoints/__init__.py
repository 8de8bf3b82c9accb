"""Reading a checkpoint of any layout (see `layouts`) as a Dynamic-LLaVA."""

from dynllava_plugin.model.checkpoints.loading import load_model, load_without_processor

__all__ = ["load_model", "load_without_processor"]
