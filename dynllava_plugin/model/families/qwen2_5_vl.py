"""Qwen2.5-VL: positions on three axes."""

from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)

from dynllava_plugin.model.families.registration import plain_family, with_llm
from dynllava_plugin.model.families.text_models import DynamicQwen2_5_VLTextModel
from dynllava_plugin.model.families.turned_positions import TurnedPositions

DynamicQwen2_5_VLModel = with_llm(Qwen2_5_VLModel, DynamicQwen2_5_VLTextModel, __name__)
DynamicQwen2_5_VLConfig, DynamicQwen2_5_VLForConditionalGeneration = plain_family(
    Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, DynamicQwen2_5_VLModel, __name__, TurnedPositions
)
