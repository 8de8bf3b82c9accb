"""Qwen3-VL: positions on three axes, and features of the vision tower's depth added behind the first layers; videos are refused."""

from typing import Any

import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLModel

from dynllava_plugin.model.families.registration import plain_family
from dynllava_plugin.model.families.turned_positions import TurnedPositions
from dynllava_plugin.policies import TokenLayout


class Deepstack(TurnedPositions):
    """What Qwen3-VL has beside turned positions."""

    def deepstack(self, encoded: Any, embeds: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, ...]:
        """Return for each of the first layers what is added behind it, [B, L, d]: 0 where there is no image token."""
        added = []
        for level in encoded.deepstack_features:
            dense = torch.zeros_like(embeds)
            if layout.image_lengths:
                dense.view(-1, embeds.shape[-1])[layout.image_index] = torch.cat(tuple(level)).to(embeds)
            added.append(dense)
        return tuple(added)


DynamicQwen3VLConfig, DynamicQwen3VLForConditionalGeneration = plain_family(
    Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel, __name__, Deepstack
)
