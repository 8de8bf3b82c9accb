"""LLaVA's vision side: its projectors, and what happens where a policy reduces patches before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.models.llava.modeling_llava import LlavaModel

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.families.projectors import STOCK, TOKENPACKER, build_projector, tower_states
from dynllava_plugin.policies.base import Patches, Policy, TokenLayout

EXTRA = 2  # channels behind the features of a reduced image: 1 where the token stays, and its score


class DynamicLlavaModel(LlavaModel):
    """`LlavaModel` whose image features may be fewer: they stay N rows an image, each with a mark of whether it counts.

    `generate` encodes images before the first forward call and repeats the result for each beam, so that what the
    vision side decides has to travel with the features.
    """

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
        """As `LlavaModel`; where the policy reduces patches, `pooler_output` is M tensors [N, d + EXTRA]."""
        policy = self.language_model.policy
        if self.config.projector_type == TOKENPACKER:
            if policy.reduces_patches:
                raise UserError(
                    f"{policy.name}: drops patches before the projector, but a TokenPacker needs all of them"
                )
            return self._packed_features(pixel_values, **kwargs)
        if not policy.reduces_patches:
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **kwargs,
            )
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if not isinstance(layer, int) or strategy != "default":
            raise UserError(
                f"{policy.name}: needs the patches of one vision layer without the class token, "
                f"not vision_feature_layer={layer}, vision_feature_select_strategy={strategy!r}"
            )
        kwargs.pop("return_dict", None)
        encoder_layers = _encoder_layers(self.vision_tower, policy)
        watched = len(encoder_layers) - 1
        if policy.vision_layer == "selected":
            watched = (
                layer - 1 if layer >= 0 else len(encoder_layers) + layer
            )  # hidden_states[i] leaves layer i - 1
        with _queries_and_keys(encoder_layers[watched].self_attn, policy) as seen:
            outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
        hidden = outputs.hidden_states[layer]
        patches = Patches(
            hidden[:, 1:],
            hidden[:, 0],
            seen["query"],
            seen["key"],
            heads=self.config.vision_config.num_attention_heads,
        )
        reduced = policy.reduce_patches(patches)
        features = self.multi_modal_projector(reduced.tokens[reduced.keep])  # only what stays
        rows = features.new_zeros(*reduced.keep.shape, features.shape[-1] + EXTRA)
        rows[..., :-EXTRA][reduced.keep] = features
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


def reduce_images(
    policy: Policy, features: torch.Tensor, layout: TokenLayout, question: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Image features [M, N, d] or [M, N, d + EXTRA] -> [M, N, d]; notes in `layout` which places stay empty."""
    assert layout.image_mask is not None
    if policy.reduces_patches:
        tokens, keep, score = features[..., :-EXTRA], features[..., -2] > 0.5, features[..., -1]
    else:
        reduced = policy.reduce_tokens(features, question)
        tokens, keep, score = reduced.tokens, reduced.keep, reduced.score
    layout.packed_positions = policy.packed_positions
    layout.removed = torch.zeros_like(layout.image_mask).masked_scatter(layout.image_mask, ~keep)
    layout.image_score = score
    return tokens


def mean_question(
    embeds: torch.Tensor, layout: TokenLayout, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """float32 [M, d]: for each image the mean embedding of its sample's prompt text behind the last image, else of all of it."""
    assert layout.image_mask is not None
    text = ~layout.image_mask
    if attention_mask is not None:
        text &= attention_mask[:, -text.shape[1] :].bool()
    columns = torch.arange(text.shape[1], device=text.device)
    text = text & layout.before_output(columns)
    behind = text & (columns > torch.where(layout.image_mask, columns, -1).amax(1, keepdim=True))
    chosen = torch.where(behind.any(1, keepdim=True), behind, text)[..., None]
    means = (embeds.float() * chosen).sum(1) / chosen.sum(1).clamp(min=1)  # [B, d]
    images = layout.image_mask.sum(1) // layout.tokens_per_image
    return means.repeat_interleave(images, 0)


def _encoder_layers(tower: Any, policy: Policy) -> Any:
    encoder = getattr(getattr(tower, "vision_model", tower), "encoder", None)
    layers = getattr(encoder, "layers", None)
    if not layers or not hasattr(layers[0].self_attn, "q_proj") or not hasattr(layers[0].self_attn, "k_proj"):
        raise UserError(
            f"{policy.name}: needs the attention of a CLIP vision tower, not {type(tower).__name__}"
        )
    return layers


@contextmanager
def _queries_and_keys(attention: Any, policy: Policy) -> Iterator[dict[str, torch.Tensor]]:
    """The layer's projected queries and keys [M, 1 + N, c] of the calls made inside."""
    seen: dict[str, torch.Tensor] = {}

    def keep_as(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            seen[name] = output

        return hook

    handles = [
        attention.q_proj.register_forward_hook(keep_as("query")),
        attention.k_proj.register_forward_hook(keep_as("key")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
