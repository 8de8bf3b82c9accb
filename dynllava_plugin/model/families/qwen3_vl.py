"""Qwen3-VL: positions on three axes; features of the vision tower's depth are added behind the first layers."""

from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLModel

from dynllava_plugin.model.families.registration import plain_family
from dynllava_plugin.model.families.turned_positions import TurnedPositions

DynamicQwen3VLConfig, DynamicQwen3VLForConditionalGeneration = plain_family(
    Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel, __name__, TurnedPositions
)
