"""LLaVA-NeXT (1.6): an image is its tiles and newline tokens, `image_sizes` travels with the pixels."""

from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
)

from dynllava_plugin.model.families.registration import plain_family

DynamicLlavaNextConfig, DynamicLlavaNextForConditionalGeneration = plain_family(
    LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextModel, __name__
)
