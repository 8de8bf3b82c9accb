"""LLaVA-NeXT-Video: an image as LLaVA-NeXT's, a video is its frames' pooled tokens."""

from transformers import LlavaNextVideoConfig
from transformers.models.llava_next_video.modeling_llava_next_video import (
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoModel,
)

from dynllava_plugin.model.families.registration import plain_family

DynamicLlavaNextVideoConfig, DynamicLlavaNextVideoForConditionalGeneration = plain_family(
    LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration, LlavaNextVideoModel, __name__
)
