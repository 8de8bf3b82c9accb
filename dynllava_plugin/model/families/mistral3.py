"""Mistral3: a Pixtral tower, whose images have as many tokens as they have merged patches."""

from __future__ import annotations

from transformers import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3ForConditionalGeneration, Mistral3Model

from dynllava_plugin.model.configuration import SparseVLMConfig
from dynllava_plugin.model.families.registration import register_family
from dynllava_plugin.model.modeling import SparseVLM


class DynamicMistral3Config(SparseVLMConfig, Mistral3Config):
    """Mistral3's config with `sparsity`."""

    model_type = "dynamic_mistral3"


class DynamicMistral3ForConditionalGeneration(SparseVLM, Mistral3ForConditionalGeneration):
    """Mistral3 with gates between its LLM's layers."""

    config: DynamicMistral3Config
    config_class = DynamicMistral3Config
    model_class = Mistral3Model
    image_needs = ("pixel_values", "image_sizes")
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer")


register_family(DynamicMistral3ForConditionalGeneration, Mistral3Config)
