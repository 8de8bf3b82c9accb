"""What stands between LLaVA-1.5's vision tower and its LLM: a linear layer, an MLP, nothing, or a TokenPacker."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dynllava_plugin.errors import UserError

STOCK, LINEAR, IDENTITY, TOKENPACKER = "mlp2x_gelu", "linear", "identity", "tokenpacker"
KNOWN = f"{LINEAR}, mlpNx_gelu with N from 1 to 9, {IDENTITY}, {TOKENPACKER}"
# The tower's hidden states a TokenPacker reads its details from (0: embeddings, i: output of layer i).
PACKED_STATES = (12, 16, 22, 23)
TOWER_LAYERS = 24
HEAD_WIDTH = 128


class Mlp(nn.Module):
    """Linear layers `linear_1` to `linear_N` with GELU between them: [..., d] -> [..., H]."""

    def __init__(self, width: int, hidden_size: int, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            self.add_module(f"linear_{index + 1}", nn.Linear(hidden_size if index else width, hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        first, *rest = self.children()
        features = first(features)
        for linear in rest:
            features = linear(F.gelu(features))
        return features


class TokenPacker(nn.Module):
    """One token for each block of s x s patches (Table 2 of the paper; names as published).

    A block's query is its part of the downsized grid of one hidden state; it attends to the block's own patches in four concatenated
    hidden states. `width` d is the tower's, `hidden_size` H the LLM's; `grid` g are the patches a side, `scale` s divides g.
    """

    def __init__(self, width: int, hidden_size: int, grid: int, scale: int, heads: int) -> None:
        super().__init__()
        self.grid, self.scale = grid, scale
        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1 = _two_layers(len(PACKED_STATES) * width, width)
        self.v_proj_1 = _two_layers(len(PACKED_STATES) * width, width)
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = _two_layers(width, hidden_size)

    def forward(self, single: torch.Tensor, multi: torch.Tensor) -> torch.Tensor:
        """Return tokens [M, (g / s) ** 2, H] of patches [M, g * g, d] and [M, g * g, 4 d], all row by row."""
        images, cells = len(single), self.grid // self.scale
        patches = single.transpose(1, 2).unflatten(-1, (self.grid, self.grid))
        coarse = F.interpolate(patches.float(), (cells, cells), mode="bilinear").to(single.dtype)
        query = self.ln_q_1(self.q_proj_1(coarse.flatten(2).transpose(1, 2)))
        key, value = self.ln_k_1(self.k_proj_1(multi)), self.ln_v_1(self.v_proj_1(multi))
        mixed, _ = self.clip_attn(
            query.reshape(images * cells * cells, 1, -1),
            self._blocks(key),
            self._blocks(value),
            need_weights=False,
        )
        return self.mlp(mixed.view(images, cells * cells, -1))

    def _blocks(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches [M, g * g, d] -> those of each block [M * (g / s) ** 2, s * s, d]."""
        cells = self.grid // self.scale
        split = patches.view(len(patches), cells, self.scale, cells, self.scale, -1).transpose(2, 3)
        return split.reshape(len(patches) * cells * cells, self.scale**2, -1)


def build_projector(config: Any) -> nn.Module:
    """Return the projector that a `DynamicLlavaConfig` means, from the tower's width to the LLM's, after `check_projector`."""
    check_projector(config)
    vision, hidden_size, kind = config.vision_config, config.text_config.hidden_size, config.projector_type
    if kind == STOCK:
        return LlavaMultiModalProjector(config)
    if kind == IDENTITY:
        return nn.Identity()
    if kind == LINEAR:
        return nn.Linear(vision.hidden_size, hidden_size)
    if kind == TOKENPACKER:
        # The published code counts heads by width, 8 at CLIP ViT-L's; a tower too narrow for that has its own count.
        heads = vision.hidden_size // HEAD_WIDTH or vision.num_attention_heads
        return TokenPacker(vision.hidden_size, hidden_size, _grid(vision), config.tokenpacker_scale, heads)
    return Mlp(vision.hidden_size, hidden_size, _mlp_depth(kind))


def check_projector(config: Any) -> None:
    """Raise `UserError` where a config's projector is unknown, or doesn't fit its tower or its LLM."""
    vision, kind = config.vision_config, config.projector_type
    if kind not in (LINEAR, IDENTITY, TOKENPACKER) and not _mlp_depth(kind):
        raise UserError(f"projector {kind!r} is unknown; known are {KNOWN}")
    if kind == IDENTITY and vision.hidden_size != config.text_config.hidden_size:
        raise UserError(
            f"an identity projector between a tower {vision.hidden_size} wide and an LLM "
            f"{config.text_config.hidden_size} wide; choose another projector"
        )
    if kind != STOCK and not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"projector {kind!r} reads one vision feature layer, not {config.vision_feature_layer}"
        )
    if kind != TOKENPACKER:
        return
    scale = config.tokenpacker_scale
    if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1 or _grid(vision) % scale:
        raise UserError(
            f"a TokenPacker needs a scale factor that divides the tower's {_grid(vision)} patches a side, not {scale!r}"
        )
    if vision.num_hidden_layers < TOWER_LAYERS:
        raise UserError(
            f"a TokenPacker reads hidden states {', '.join(map(str, PACKED_STATES))} of a tower of {TOWER_LAYERS} layers; "
            f"this one has {vision.num_hidden_layers}"
        )
    if config.vision_feature_select_strategy != "default":
        raise UserError("a TokenPacker reads patches alone, not the class token")


def image_tokens(config: Any) -> int:
    """Return how many tokens an image has for the LLM: one a patch, or one a TokenPacker's block; and the class token's."""
    tokens = (_grid(config.vision_config) // packed_side(config)) ** 2
    return tokens + (config.vision_feature_select_strategy == "full")


def packed_side(config: Any) -> int:
    """Return how many patches a side become one token: 1 without a TokenPacker."""
    return config.tokenpacker_scale if config.projector_type == TOKENPACKER else 1


def tower_states(hidden_states: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a `TokenPacker` reads of a tower's hidden states, `layer` being LLaVA's choice: single, multi."""
    multi = torch.cat([hidden_states[index][:, 1:] for index in PACKED_STATES], -1)
    return hidden_states[layer][:, 1:], multi


def _two_layers(width: int, hidden_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


def _grid(vision: Any) -> int:
    return vision.image_size // vision.patch_size


def _mlp_depth(kind: str) -> int:
    found = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    return int(found[1]) if found else 0
