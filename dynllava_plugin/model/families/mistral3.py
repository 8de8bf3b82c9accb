"""Mistral3: a Pixtral tower, whose images have as many tokens as they have merged patches."""

from transformers import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3ForConditionalGeneration, Mistral3Model

from dynllava_plugin.model.families.registration import plain_family

DynamicMistral3Config, DynamicMistral3ForConditionalGeneration = plain_family(
    Mistral3Config, Mistral3ForConditionalGeneration, Mistral3Model, __name__
)
