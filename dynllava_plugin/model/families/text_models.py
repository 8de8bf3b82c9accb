"""The LLMs of all families: stock configs with `sparsity`, stock models with gates between their layers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

from dynllava_plugin.model.configuration import PREFIX, TEXT_CONFIGS, SparseTextConfig, dynamic
from dynllava_plugin.model.decoder import SparseDecoder


def _with_gates(stock_config: Any, stock_model: Any) -> tuple[Any, Any]:
    """Return our config and model of a stock LLM, `DynamicLlamaConfig` and `DynamicLlamaModel` of Llama, known to transformers."""
    field = {"__annotations__": {"sparsity": Any}, "sparsity": None}
    config = dynamic(
        stock_config, SparseTextConfig, __name__, "with `sparsity`",
        model_type=PREFIX + stock_config.model_type, **field,
    )  # fmt: skip
    model = dynamic(
        stock_model, SparseDecoder, __name__, "with gates between its layers", config_class=config
    )
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    TEXT_CONFIGS[stock_config.model_type] = config
    return config, model


DynamicLlamaConfig, DynamicLlamaModel = _with_gates(LlamaConfig, LlamaModel)
DynamicQwen2Config, DynamicQwen2Model = _with_gates(Qwen2Config, Qwen2Model)
DynamicQwen3Config, DynamicQwen3Model = _with_gates(Qwen3Config, Qwen3Model)
DynamicMistralConfig, DynamicMistralModel = _with_gates(MistralConfig, MistralModel)
DynamicQwen2_5_VLTextConfig, DynamicQwen2_5_VLTextModel = _with_gates(
    Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
)
DynamicQwen2VLTextConfig, DynamicQwen2VLTextModel = _with_gates(Qwen2VLTextConfig, Qwen2VLTextModel)
DynamicQwen3VLTextConfig, DynamicQwen3VLTextModel = _with_gates(Qwen3VLTextConfig, Qwen3VLTextModel)
DynamicQwen3VLMoeTextConfig, DynamicQwen3VLMoeTextModel = _with_gates(
    Qwen3VLMoeTextConfig, Qwen3VLMoeTextModel
)
