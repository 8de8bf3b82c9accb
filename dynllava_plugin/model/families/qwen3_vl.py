"""Qwen3-VL: positions on three axes, and features of the vision tower's depth added behind the first layers; videos are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen3VLConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLModel

from dynllava_plugin.model.configuration import SparseVLMConfig
from dynllava_plugin.model.families.registration import register_family
from dynllava_plugin.model.families.text_models import DynamicQwen3VLTextConfig
from dynllava_plugin.model.families.turned_positions import TurnedPositions
from dynllava_plugin.policies import TokenLayout


class DynamicQwen3VLConfig(SparseVLMConfig, Qwen3VLConfig):
    """Qwen3-VL's config with `sparsity`."""

    model_type = "dynamic_qwen3_vl"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=Qwen3VLVisionConfig),
        "text_config": SubConfigSpec(config_class=DynamicQwen3VLTextConfig),
    }


class DynamicQwen3VLForConditionalGeneration(TurnedPositions, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with gates between its LLM's layers."""

    config: DynamicQwen3VLConfig
    config_class = DynamicQwen3VLConfig
    model_class = Qwen3VLModel

    def deepstack(self, encoded: Any, embeds: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, ...]:
        """Return for each of the first layers what is added behind it, [B, L, d]: 0 where there is no image token."""
        levels: Sequence[Sequence[torch.Tensor]] = encoded.deepstack_features
        added = []
        for level in levels:
            dense = torch.zeros_like(embeds)
            if layout.image_lengths:
                dense.view(-1, embeds.shape[-1])[layout.image_index] = torch.cat(tuple(level)).to(embeds)
            added.append(dense)
        return tuple(added)


register_family(DynamicQwen3VLForConditionalGeneration, Qwen3VLConfig)
