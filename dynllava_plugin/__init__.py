"""Dynamic-LLaVA on current transformers: train it, evaluate it in lmms-eval and VLMEvalKit, read the tables.

Importing this package registers the model with `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor`.
"""

from dynllava_plugin.model.checkpoints import load_model
from dynllava_plugin.model.families.llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynllava_plugin.sparsity.config import SparsityConfig

__version__ = "0.1.0"
__all__ = ["DynamicLlavaConfig", "DynamicLlavaForConditionalGeneration", "SparsityConfig", "load_model"]
