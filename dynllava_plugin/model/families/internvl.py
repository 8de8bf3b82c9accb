"""InternVL in transformers' layout: each tile of an image counts as an image."""

from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration, InternVLModel

from dynllava_plugin.model.families.registration import plain_family
from dynllava_plugin.policies.base import SQUARE

DynamicInternVLConfig, DynamicInternVLForConditionalGeneration = plain_family(
    InternVLConfig, InternVLForConditionalGeneration, InternVLModel, __name__, gives=frozenset({SQUARE})
)
