"""LLaVA-1.5: with a Llama, Qwen2 or Mistral LLM; the vision side where a policy reduces patches before the projector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.configuration import SparseVLMConfig
from dynllava_plugin.model.families.projectors import STOCK, TOKENPACKER, build_projector, tower_states
from dynllava_plugin.model.families.registration import register_family
from dynllava_plugin.model.modeling import SparseVLM
from dynllava_plugin.model.token_layout import MARKS
from dynllava_plugin.policies import Policy
from dynllava_plugin.policies.base import CLASS_TOKEN, SQUARE, Patches


class DynamicLlavaConfig(SparseVLMConfig, LlavaConfig):
    """LLaVA-1.5's config with `sparsity`."""

    model_type = "dynamic_llava"

    # "pad" extends an image to a square with its processor's mean colour before resizing, as LLaVA-1.5 does; or "square"
    image_aspect_ratio: str = "pad"
    # rows of the vocabulary that stand for images and padding and were never trained: their logits are masked
    placeholder_tokens: int = 0
    placeholder_start: int | None = None  # the first of them, where they are not the last rows
    projector_type: str = "mlp2x_gelu"  # LLaVA-1.5's, "linear", "mlpNx_gelu", "identity" or "tokenpacker"
    tokenpacker_scale: int | None = None  # patches a side that a TokenPacker makes one token of

    @property
    def placeholders(self) -> slice:
        """Return the rows of the vocabulary that were never trained."""
        start, rows = self.placeholder_start, self.placeholder_tokens
        start = self.text_config.vocab_size - rows if start is None else start
        return slice(start, start + rows)


class DynamicLlavaModel(LlavaModel):
    """`LlavaModel` whose image features may be fewer: they stay N rows an image, each with a mark of whether it counts."""

    config_class = DynamicLlavaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.projector_type != STOCK:
            self.multi_modal_projector = build_projector(config)
            self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what `LlavaModel`'s does; where the policy reduces patches, `pooler_output` is M tensors [N, d + MARKS]."""
        policy = self.language_model.policy
        layer: Any = vision_feature_layer
        layer = self.config.vision_feature_layer if layer is None else layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        _check_patches(policy, self.config, layer, strategy)
        if self.config.projector_type == TOKENPACKER:
            return self._packed_features(pixel_values, **kwargs)
        if not policy.reduces_patches:
            kwargs |= {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
            return super().get_image_features(pixel_values, **kwargs)
        kwargs.pop("return_dict", None)
        tower: Any = self.vision_tower
        encoder_layers = getattr(tower, "vision_model", tower).encoder.layers
        depth, chooser = len(encoder_layers), policy.image.first
        watched = depth - 1
        if chooser.vision_layer == "selected":
            watched = layer - 1 if layer >= 0 else depth + layer  # hidden_states[i] leaves layer i - 1
        earlier = chooser.earlier_layer(depth)
        with _queries_and_keys(encoder_layers, {watched, watched if earlier is None else earlier}) as seen:
            outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
        hidden = outputs.hidden_states[layer]
        projected = [
            (seen[index, "q_proj"], seen[index, "k_proj"])
            for index in (watched, earlier)
            if index is not None
        ]
        heads = self.config.vision_config.num_attention_heads
        reduced = policy.image.reduce_patches(
            Patches(hidden[:, 1:], hidden[:, 0], *projected[0], heads, *projected[1:])
        )
        features = self.multi_modal_projector(reduced.tokens[reduced.keep])  # only what stays
        rows = features.new_zeros(*reduced.keep.shape, features.shape[-1] + MARKS)
        rows[..., :-MARKS][reduced.keep] = features
        rows[..., -2] = reduced.keep.to(rows.dtype)
        if reduced.score is not None:
            rows[..., -1] = reduced.score.to(rows.dtype)
        outputs.pooler_output = list(rows)
        return outputs

    def _packed_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """As `LlavaModel.get_image_features`, of a TokenPacker, which reads several hidden states."""
        outputs = self.vision_tower(
            pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True}
        )
        states = tower_states(outputs.hidden_states, self.config.vision_feature_layer)
        outputs.pooler_output = list(self.multi_modal_projector(*states))
        return outputs


def _check_patches(policy: Policy, config: Any, layer: Any, strategy: str) -> None:
    """Raise `UserError` for a policy that chooses patches of a tower or for a projector that can't do with those."""
    if not policy.reduces_patches:
        return
    if config.projector_type == TOKENPACKER:
        raise UserError(
            f"{policy.name}: drops patches before the projector, but a TokenPacker needs all of them"
        )
    if config.vision_config.model_type != "clip_vision_model":
        raise UserError(f"{policy.name}: needs {CLASS_TOKEN}, not of a {config.vision_config.model_type}")
    if not isinstance(layer, int) or strategy != "default":
        raise UserError(
            f"{policy.name}: needs the patches of one vision layer without the class token, "
            f"not vision_feature_layer={layer}, vision_feature_select_strategy={strategy!r}"
        )


@contextmanager
def _queries_and_keys(
    encoder_layers: Any, watched: set[int]
) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """Yield the watched layers' projected queries and keys [M, 1 + N, c] of the calls made inside."""
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str], module: Any, inputs: Any, output: torch.Tensor) -> None:
        seen[key] = output

    handles = [
        getattr(encoder_layers[layer].self_attn, name).register_forward_hook(partial(keep, (layer, name)))
        for layer in watched
        for name in ("q_proj", "k_proj")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class DynamicLlavaForConditionalGeneration(SparseVLM, LlavaForConditionalGeneration):
    """LLaVA-1.5 with dynamic vision-language context sparsification (arXiv 2412.00876)."""

    config: DynamicLlavaConfig
    config_class = DynamicLlavaConfig
    model_class = DynamicLlavaModel
    gives = frozenset({CLASS_TOKEN, SQUARE})

    @classmethod
    def check_images(cls, policy: Policy, config: Any) -> None:
        """Check as `SparseVLM.check_images`, and what the policy needs of vision tower and projector."""
        _check_patches(policy, config, config.vision_feature_layer, config.vision_feature_select_strategy)
        super().check_images(policy, config)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the stock class's does; placeholders stay the rows that they are."""
        if self.config.placeholder_tokens:
            self.config.placeholder_start = self.config.placeholders.start
        return super().resize_token_embeddings(*args, **kwargs)


register_family(DynamicLlavaForConditionalGeneration, LlavaConfig)
