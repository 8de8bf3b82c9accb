"""Qwen2-VL: positions on three axes."""

from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration, Qwen2VLModel

from dynllava_plugin.model.families.registration import plain_family, with_llm
from dynllava_plugin.model.families.text_models import DynamicQwen2VLTextModel
from dynllava_plugin.model.families.turned_positions import TurnedPositions

DynamicQwen2VLModel = with_llm(Qwen2VLModel, DynamicQwen2VLTextModel, __name__)
DynamicQwen2VLConfig, DynamicQwen2VLForConditionalGeneration = plain_family(
    Qwen2VLConfig, Qwen2VLForConditionalGeneration, DynamicQwen2VLModel, __name__, TurnedPositions
)
