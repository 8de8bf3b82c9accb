"""Qwen2.5-VL: positions on three axes; videos are refused."""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)

from dynllava_plugin.model.configuration import SparseVLMConfig
from dynllava_plugin.model.families.registration import register_family
from dynllava_plugin.model.families.text_models import DynamicQwen2_5_VLTextConfig, DynamicQwen2_5_VLTextModel
from dynllava_plugin.model.families.turned_positions import TurnedPositions


class DynamicQwen2_5_VLConfig(SparseVLMConfig, Qwen2_5_VLConfig):
    """Qwen2.5-VL's config with `sparsity`."""

    model_type = "dynamic_qwen2_5_vl"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=Qwen2_5_VLVisionConfig),
        "text_config": SubConfigSpec(config_class=DynamicQwen2_5_VLTextConfig),
    }


class DynamicQwen2_5_VLModel(Qwen2_5_VLModel):
    """`Qwen2_5_VLModel`, which names its text model's class itself, around ours."""

    config_class = DynamicQwen2_5_VLConfig

    def __init__(self, config: DynamicQwen2_5_VLConfig) -> None:
        super().__init__(config)
        self.language_model = DynamicQwen2_5_VLTextModel._from_config(config.text_config)
        self.post_init()


class DynamicQwen2_5_VLForConditionalGeneration(TurnedPositions, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with gates between its LLM's layers."""

    config: DynamicQwen2_5_VLConfig
    config_class = DynamicQwen2_5_VLConfig
    model_class = DynamicQwen2_5_VLModel


register_family(DynamicQwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig)
