"""Configuration: LLaVA-1.5's with the sparsification's settings inside the LLM's part."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, LlavaConfig
from transformers.configuration_utils import SubConfigSpec

from dynllava_plugin.sparsity.config import SparsityConfig


class DynamicLlamaConfig(LlamaConfig):
    """A Llama whose layers from `sparsity.sparse_layer` on see a reduced context."""

    model_type = "dynamic_llama"

    sparsity: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.sparsity is None:
            self.sparsity = SparsityConfig()
        elif isinstance(self.sparsity, dict):
            self.sparsity = SparsityConfig.from_dict(self.sparsity)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `sparsity` as a plain dict."""
        return {**super().to_dict(), "sparsity": self.sparsity.to_dict()}


class DynamicLlavaConfig(LlavaConfig):
    """LLaVA-1.5 with a `DynamicLlamaConfig` as its LLM.

    Parameters
    ----------
    image_aspect_ratio : "pad" | "square"
        "pad" extends an image to a square with its processor's mean colour before resizing, as LLaVA-1.5 does.
    placeholder_tokens : int
        Last rows of the vocabulary that stand for images and padding and were never trained; their logits are masked.
    projector_type : str
        "mlp2x_gelu" (LLaVA-1.5's), "linear", "mlpNx_gelu", "identity" or "tokenpacker".
    tokenpacker_scale : int, optional
        Patches a side that a TokenPacker makes one token of.
    """

    model_type = "dynamic_llava"
    sub_configs_defaults = {
        **LlavaConfig.sub_configs_defaults,
        "text_config": SubConfigSpec(config_class=DynamicLlamaConfig),
    }

    image_aspect_ratio: str = "pad"
    placeholder_tokens: int = 0
    projector_type: str = "mlp2x_gelu"
    tokenpacker_scale: int | None = None

    @property
    def sparsity(self) -> SparsityConfig:
        """The settings in force; change them through `model.set_sparsity(...)`."""
        return self.text_config.sparsity


AutoConfig.register("dynamic_llama", DynamicLlamaConfig)
AutoConfig.register("dynamic_llava", DynamicLlavaConfig)
