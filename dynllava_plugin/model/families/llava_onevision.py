"""LLaVA-OneVision: an image is its tiles and newline tokens; videos are refused."""

from __future__ import annotations

from transformers import LlavaOnevisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)

from dynllava_plugin.model.configuration import SparseVLMConfig
from dynllava_plugin.model.families.registration import register_family
from dynllava_plugin.model.modeling import SparseVLM


class DynamicLlavaOnevisionConfig(SparseVLMConfig, LlavaOnevisionConfig):
    """LlavaOnevision's config with `sparsity`."""

    model_type = "dynamic_llava_onevision"


class DynamicLlavaOnevisionForConditionalGeneration(SparseVLM, LlavaOnevisionForConditionalGeneration):
    """LlavaOnevision with gates between its LLM's layers."""

    config: DynamicLlavaOnevisionConfig
    config_class = DynamicLlavaOnevisionConfig
    model_class = LlavaOnevisionModel
    image_needs = ("pixel_values", "image_sizes")
    image_inputs = (
        *image_needs, "batch_num_images", "vision_feature_layer", "vision_feature_select_strategy"
    )  # fmt: skip


register_family(DynamicLlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig)
