"""LLaVA-OneVision: an image is its tiles and newline tokens."""

from transformers import LlavaOnevisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)

from dynllava_plugin.model.families.registration import plain_family

DynamicLlavaOnevisionConfig, DynamicLlavaOnevisionForConditionalGeneration = plain_family(
    LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel, __name__
)
