"""InternVL in transformers' layout: each tile of an image counts as an image."""

from __future__ import annotations

from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration, InternVLModel

from dynllava_plugin.model.configuration import SparseVLMConfig
from dynllava_plugin.model.families.registration import register_family
from dynllava_plugin.model.modeling import SparseVLM


class DynamicInternVLConfig(SparseVLMConfig, InternVLConfig):
    """InternVL's config with `sparsity`."""

    model_type = "dynamic_internvl"


class DynamicInternVLForConditionalGeneration(SparseVLM, InternVLForConditionalGeneration):
    """InternVL with gates between its LLM's layers."""

    config: DynamicInternVLConfig
    config_class = DynamicInternVLConfig
    model_class = InternVLModel
    image_inputs = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")


register_family(DynamicInternVLForConditionalGeneration, InternVLConfig)
