"""The LLMs of all families: stock configs with `sparsity`, stock models with gates between their layers."""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from dynllava_plugin.model.configuration import SparseTextConfig, register_text_config
from dynllava_plugin.model.decoder import SparseDecoder


class DynamicLlamaConfig(SparseTextConfig, LlamaConfig):
    """Llama's config with `sparsity`."""

    model_type = "dynamic_llama"
    sparsity: Any = None


class DynamicLlamaModel(SparseDecoder, LlamaModel):
    """Llama with gates between its layers."""

    config_class = DynamicLlamaConfig


class DynamicQwen2Config(SparseTextConfig, Qwen2Config):
    """Qwen2's config with `sparsity`."""

    model_type = "dynamic_qwen2"
    sparsity: Any = None


class DynamicQwen2Model(SparseDecoder, Qwen2Model):
    """Qwen2 with gates between its layers."""

    config_class = DynamicQwen2Config


class DynamicQwen3Config(SparseTextConfig, Qwen3Config):
    """Qwen3's config with `sparsity`."""

    model_type = "dynamic_qwen3"
    sparsity: Any = None


class DynamicQwen3Model(SparseDecoder, Qwen3Model):
    """Qwen3 with gates between its layers."""

    config_class = DynamicQwen3Config


class DynamicMistralConfig(SparseTextConfig, MistralConfig):
    """Mistral's config with `sparsity`."""

    model_type = "dynamic_mistral"
    sparsity: Any = None


class DynamicMistralModel(SparseDecoder, MistralModel):
    """Mistral with gates between its layers."""

    config_class = DynamicMistralConfig


class DynamicQwen2_5_VLTextConfig(SparseTextConfig, Qwen2_5_VLTextConfig):
    """Qwen2.5-VL's text config with `sparsity`."""

    model_type = "dynamic_qwen2_5_vl_text"
    sparsity: Any = None


class DynamicQwen2_5_VLTextModel(SparseDecoder, Qwen2_5_VLTextModel):
    """Qwen2.5-VL's LLM with gates between its layers."""

    config_class = DynamicQwen2_5_VLTextConfig


class DynamicQwen3VLTextConfig(SparseTextConfig, Qwen3VLTextConfig):
    """Qwen3-VL's text config with `sparsity`."""

    model_type = "dynamic_qwen3_vl_text"
    sparsity: Any = None


class DynamicQwen3VLTextModel(SparseDecoder, Qwen3VLTextModel):
    """Qwen3-VL's LLM with gates between its layers."""

    config_class = DynamicQwen3VLTextConfig


for _model in (
    DynamicLlamaModel,
    DynamicQwen2Model,
    DynamicQwen3Model,
    DynamicMistralModel,
    DynamicQwen2_5_VLTextModel,
    DynamicQwen3VLTextModel,
):
    register_text_config(_model.config_class)
    AutoModel.register(_model.config_class, _model)
