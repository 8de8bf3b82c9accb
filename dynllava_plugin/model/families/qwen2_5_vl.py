"""Qwen2.5-VL: positions on three axes."""

from typing import Any

from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)

from dynllava_plugin.model.families.registration import plain_family
from dynllava_plugin.model.families.text_models import DynamicQwen2_5_VLTextModel
from dynllava_plugin.model.families.turned_positions import TurnedPositions


class DynamicQwen2_5_VLModel(Qwen2_5_VLModel):
    """`Qwen2_5_VLModel`, which names its text model's class itself, around ours."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model = DynamicQwen2_5_VLTextModel._from_config(config.text_config)
        self.post_init()


DynamicQwen2_5_VLConfig, DynamicQwen2_5_VLForConditionalGeneration = plain_family(
    Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, DynamicQwen2_5_VLModel, __name__, TurnedPositions
)
