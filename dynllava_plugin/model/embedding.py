"""Image features in their places among the token embeddings, and which columns of a call are output text."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.vision import EXTRA, mean_question, reduce_images
from dynllava_plugin.policies import Policy, TokenLayout
from dynllava_plugin.sparsity.cache import SparseContextCache


def place_images(
    embeds: torch.Tensor,
    encoded: Sequence[torch.Tensor],
    input_ids: torch.Tensor | None,
    image_token_id: int,
    layout: TokenLayout,
    policy: Policy,
    attention_mask: torch.Tensor | None,
    training: bool,
) -> torch.Tensor:
    """Token embeddings [B, L, d] with M images' features [N, d] in their places; notes in `layout` where those are.

    Raises
    ------
    UserError
        Places and images that don't match, or features that were encoded under another policy.
    """
    if input_ids is None:
        raise UserError("inputs_embeds: images need input_ids, which say where they go")
    features = torch.stack(tuple(encoded)).to(embeds)  # [M, N, d]
    layout.image_mask = image_mask = input_ids == image_token_id
    layout.tokens_per_image = features.shape[1]
    places = int(image_mask.sum())
    # In training one image without a place stands in for none: every process of a sharded run has to go
    # through the same modules, whatever its samples.
    stands_in = training and places == 0 and len(features) == 1
    if places != features.shape[0] * features.shape[1] and not stands_in:
        raise UserError(
            f"input_ids: {places} image tokens for {features.shape[0]} images of {features.shape[1]} tokens; "
            "give as many <image> places as images"
        )
    width = embeds.shape[-1] + (EXTRA if policy.reduces_patches and not training else 0)
    if features.shape[-1] != width:
        raise UserError(
            f"mm_encoder_outputs: image features {features.shape[-1]} wide, {policy.name} needs {width}; "
            "encode the images under the policy that is in force"
        )
    if policy.at_input and not training:
        question = partial(mean_question, embeds, layout, attention_mask)
        features = reduce_images(policy, features, layout, question)
    if policy.image_seed is not None:
        layout.image_seeds = [_image_seed(image, policy.image_seed) for image in features]
    if stands_in:
        return embeds.masked_scatter(image_mask[..., None], features)
    embeds = embeds.clone()
    embeds[image_mask] = features.reshape(places, -1)  # on a CPU much faster than masked_scatter
    return embeds


def mark_output(
    layout: TokenLayout,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    cache: SparseContextCache | None,
    prompt_length: int | None,
    output_mask: torch.Tensor | None,
) -> None:
    """Note in `layout` which columns of the call are output text; `prompt_length` and `output_mask` as in `forward`."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    seen = cache.get_seq_length() if cache is not None else 0
    batch, length = given.shape[:2]
    if prompt_length is None:
        prompt_length = seen if seen and length == 1 else seen + length
    start = max(prompt_length - seen, 0)
    if start < length:
        columns = torch.arange(length, device=given.device) >= start
        layout.output_mask = columns.expand(batch, -1)
        layout.output_start = start
    if output_mask is not None and not seen:
        # The prompt's own output text; behind it, where nothing is cached, what was generated so far.
        mask = torch.zeros(batch, length, dtype=torch.bool, device=given.device)
        mask[:, : output_mask.shape[1]] = output_mask.bool()
        layout.output_mask = mask if layout.output_mask is None else mask | layout.output_mask
        layout.output_start = 0


def _image_seed(features: torch.Tensor, seed: int) -> int:
    """A seed from an image's features [N, d], rounded so that an image has the same one in every batch."""
    summary = (features.detach().float().mean(0)[:4] * 512).round().to(torch.int32).cpu()
    return zlib.crc32(summary.numpy().tobytes(), seed & 0xFFFFFFFF)
