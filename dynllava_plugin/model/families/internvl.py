"""InternVL in transformers' layout: each tile of an image counts as an image."""

from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration, InternVLModel

from dynllava_plugin.model.families.registration import plain_family

DynamicInternVLConfig, DynamicInternVLForConditionalGeneration = plain_family(
    InternVLConfig, InternVLForConditionalGeneration, InternVLModel, __name__
)
