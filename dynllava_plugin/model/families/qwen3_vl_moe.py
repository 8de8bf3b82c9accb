"""Qwen3-VL with a mixture of experts: as Qwen3-VL; its router's loss is no part of training."""

from transformers import Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
)

from dynllava_plugin.model.families.registration import plain_family
from dynllava_plugin.model.families.turned_positions import TurnedPositions

DynamicQwen3VLMoeConfig, DynamicQwen3VLMoeForConditionalGeneration = plain_family(
    Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeModel, __name__, TurnedPositions
)
