"""LLaVA-NeXT (1.6): an image is its tiles and newline tokens, `image_sizes` travels with the pixels."""

from __future__ import annotations

from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
)

from dynllava_plugin.model.configuration import SparseVLMConfig
from dynllava_plugin.model.families.registration import register_family
from dynllava_plugin.model.modeling import SparseVLM


class DynamicLlavaNextConfig(SparseVLMConfig, LlavaNextConfig):
    """LlavaNext's config with `sparsity`."""

    model_type = "dynamic_llava_next"


class DynamicLlavaNextForConditionalGeneration(SparseVLM, LlavaNextForConditionalGeneration):
    """LlavaNext with gates between its LLM's layers."""

    config: DynamicLlavaNextConfig
    config_class = DynamicLlavaNextConfig
    model_class = LlavaNextModel
    image_needs = ("pixel_values", "image_sizes")
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")


register_family(DynamicLlavaNextForConditionalGeneration, LlavaNextConfig)
