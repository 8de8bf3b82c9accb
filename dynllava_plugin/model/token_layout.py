"""Which tokens of a call are what, read once from its inputs; and image features put into their places."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies import Policy, TokenLayout
from dynllava_plugin.sparsity.cache import SparseContextCache

# What stands in a prompt beside text, and the argument of `forward` that has its pixels.
VISUALS = {"image": "pixel_values", "video": "pixel_values_videos"}
# `generate` encodes images before the first forward call and repeats the result for each beam, and evaluation keeps it. So what
# is known of an image's pixels travels in channels behind its features: what the vision tower decided of each token (1 where it
# stays, and its score), or, for a policy that uses chance, the bytes of a checksum, which every data type holds exactly.
MARKS, CHECKSUM = 2, 4


def with_checksum(features: Sequence[torch.Tensor], pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return M images' features [N_i, d + CHECKSUM]: behind each its pixels' checksum, which no batch or padding changes."""
    totals = torch.stack([(image.float() * 4096).round().long().sum() for image in pixels])
    bytes_ = (totals[:, None] >> torch.arange(0, 8 * CHECKSUM, 8, device=totals.device)) & 255
    return [
        torch.cat([image, of_image.to(image).expand(len(image), -1)], -1)
        for image, of_image in zip(features, bytes_, strict=True)
    ]


def split_features(
    features: Sequence[torch.Tensor], width: int, policy: Policy
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return M images' features [N_i, width] and what is in the channels behind them, [T, n] or None.

    Raises `UserError` for features that were encoded under another policy.
    """
    extra = MARKS if policy.reduces_patches else CHECKSUM if policy.image_seed is not None else 0
    wanted = width + extra
    for image in features:
        if image.shape[-1] != wanted:
            raise UserError(
                f"mm_encoder_outputs: image features {image.shape[-1]} wide, {policy.name} needs {wanted}; encode the images "
                "by the model's get_image_features under the policy that is in force"
            )
    if not extra:
        return list(features), None
    return [image[:, :width] for image in features], torch.cat([image[:, width:] for image in features])


def in_order_of_places(
    encoded: Mapping[str, Any], of_videos: Callable[[], Sequence[bool]]
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Return M images' and videos' features [N_i, d] in the order of their places, and, of each deepstack level, the same.

    `encoded` has what the vision tower returned of images, of videos or of both; `of_videos` tells of each place, in order,
    whether it is a video's, and is asked only where a call has both.

    Raises `UserError` for places that aren't those of the images and videos given.
    """
    parts = [encoded[kind] for kind in ("image", "video") if kind in encoded]
    features = [list(part.pooler_output) for part in parts]
    levels = [getattr(part, "deepstack_features", None) or () for part in parts]
    joined = [[one for level in of_parts for one in level] for of_parts in zip(*levels, strict=True)]
    if len(parts) == 1:
        return features[0], joined
    kinds, order, at, taken = of_videos(), [], 0, [0, 0]
    while at < len(kinds):
        kind = int(kinds[at])
        length = len(features[kind][taken[kind]]) if taken[kind] < len(features[kind]) else 0
        if not length or set(kinds[at : at + length]) != {kinds[at]}:
            break
        order.append(taken[kind] + kind * len(features[0]))
        taken[kind], at = taken[kind] + 1, at + length
    if at != len(kinds) or taken != [len(one) for one in features]:
        raise UserError(
            f"input_ids: image and video tokens are not those of {len(features[0])} images and {len(features[1])} videos; give "
            "each its places, as the checkpoint's processor does"
        )
    every = [*features[0], *features[1]]
    return [every[one] for one in order], [[level[one] for one in order] for level in joined]


def valid_columns(
    attention_mask: torch.Tensor | None, batch: int, length: int, seen: int, device: torch.device
) -> torch.Tensor:
    """Return bool [B, L], False on padding, of the call's `length` columns behind `seen` cached ones.

    Raises `UserError` for an attention mask of another shape.
    """
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask.shape != (batch, seen + length):
        raise UserError(
            f"attention_mask: shape {tuple(attention_mask.shape)}, expected {(batch, seen + length)} "
            f"({seen} cached columns and {length} new ones)"
        )
    return attention_mask[:, seen:].bool()


def output_columns(
    valid: torch.Tensor, seen: int, prompt_length: int | None, output_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, int]:
    """Return which columns bool [B, L] of a call at inference are output text (None: none), and the first that may be.

    `prompt_length` and `output_mask` are as in `forward`.
    """
    batch, length = valid.shape
    if prompt_length is None:
        prompt_length = seen if seen and length == 1 else seen + length
    start, mask = max(prompt_length - seen, 0), None
    if start < length:
        mask = (torch.arange(length, device=valid.device) >= start).expand(batch, -1)
    if output_mask is not None and not seen:
        # The prompt's own output text; behind it, where nothing is cached, what was generated so far.
        earlier = torch.zeros(batch, length, dtype=torch.bool, device=valid.device)
        earlier[:, : output_mask.shape[1]] = output_mask.bool()
        return (earlier if mask is None else mask | earlier), 0
    return mask, start


def question_mask(
    input_ids: torch.Tensor,
    valid: torch.Tensor,
    image_mask: torch.Tensor,
    output_mask: torch.Tensor | None,
    marks: tuple[tuple[int, ...], tuple[int, ...]],
) -> torch.Tensor:
    """Return bool [B, L], the text of each prompt's last question: behind the last "USER:" or image, before the last "ASSISTANT:".

    Columns that are padding or output text don't count; `marks` are the token ids of the two words.
    """
    prompt = valid if output_mask is None else valid & ~output_mask
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    user, assistant = (_starts(input_ids, prompt, mark) for mark in marks)
    end = torch.where(assistant, columns, -1).amax(1, keepdim=True)
    asked = torch.where(user & (columns < end), columns + len(marks[0]), 0).amax(1, keepdim=True)
    shown = torch.where(image_mask & (columns < end), columns + 1, 0).amax(1, keepdim=True)
    return prompt & (columns >= torch.maximum(asked, shown)) & (columns < end) & ~image_mask


def last_question(
    input_ids: torch.Tensor | None,
    valid: torch.Tensor,
    seen: int,
    output: tuple[torch.Tensor | None, int],
    image_token: int,
    marks: tuple[tuple[int, ...], tuple[int, ...]],
) -> torch.Tensor | None:
    """Return `question_mask` of a call behind `seen` columns; None where it has output text alone.

    Raises `UserError` where there is no whole prompt to look into.
    """
    if seen and output[1] == 0:
        return None
    if seen or input_ids is None:
        why = "a prompt that goes on behind a cache" if seen else "inputs_embeds"
        raise UserError(
            f"prompt_keep_rate: the last question can't be found in {why}; pass the whole prompt's input_ids, or set "
            "prompt_keep_rate=1"
        )
    return question_mask(input_ids, valid, input_ids == image_token, output[0], marks)


def _starts(input_ids: torch.Tensor, prompt: torch.Tensor, mark: tuple[int, ...]) -> torch.Tensor:
    """bool [B, L]: where the token ids `mark` begin, all of them in the prompt."""
    found = torch.zeros_like(prompt)
    if 0 < len(mark) <= input_ids.shape[1]:
        wanted = torch.tensor(mark, device=input_ids.device)
        same = (input_ids.unfold(1, len(mark), 1) == wanted) & prompt.unfold(1, len(mark), 1)
        found[:, : same.shape[1]] = same.all(-1)
    return found


def read_layout(
    valid: torch.Tensor,
    image_mask: torch.Tensor | None,
    features: Sequence[torch.Tensor] | None,
    output: tuple[torch.Tensor | None, int],
    policy: Policy,
    training: bool,
    marks: torch.Tensor | None = None,
) -> TokenLayout:
    """Return the layout of a call's tokens, False in `valid` bool [B, L] on padding; the host reads its counts here, once.

    `image_mask` bool [B, L] are the places of image tokens, `features` M tensors [N_i, d] the call's images in the order of their
    places and `marks` [T, n] what `split_features` found behind them, of which a policy that uses chance gets a seed an image;
    `output` is output text and its first column, as from `output_columns`. In training one image without a place may stand in
    for none: every process of a sharded run has to go through the same modules, whatever its samples.

    Raises `UserError` for image places and images that don't match, in number or from sample to sample.
    """
    places = torch.zeros_like(valid) if image_mask is None else image_mask
    facts = torch.stack([valid.sum(1), valid[:, -1].long(), places.sum(1)])
    counts, ends, per_row = facts.tolist()
    lengths = [] if features is None else [len(image) for image in features]
    if training and len(lengths) == 1 and not any(per_row):
        lengths = []
    rows = _rows_of_images(per_row, lengths)
    seeds = None
    if features is not None and marks is not None and policy.image_seed is not None:
        firsts = [0, *accumulate(lengths[:-1])]
        seeds = tuple(
            zlib.crc32(bytes(map(int, checksum)), policy.image_seed & 0xFFFFFFFF)
            for checksum in marks[firsts].tolist()
        )
        marks = None
    return TokenLayout(
        image_mask=image_mask if features is not None else None,
        image_lengths=tuple(lengths),
        image_rows=tuple(rows),
        image_index=None if features is None else places.flatten().nonzero()[:, 0],
        output_mask=output[0],
        output_start=output[1],
        counts=tuple(counts),
        ends_real=all(ends),
        image_seeds=seeds,
        image_marks=marks,
    )


def _rows_of_images(places: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Return the sample of each image, from the samples' image places and the images' tokens."""
    if sum(places) != sum(lengths):
        images = f"{len(lengths)} images with {sum(lengths)} tokens in all"
        if len(set(lengths)) == 1:
            images = f"{len(lengths)} images of {lengths[0]} tokens"
        elif not lengths:
            images = "no image (pixel_values) or video"
        raise UserError(
            f"input_ids: {sum(places)} image tokens for {images}; give as many <image> places as images"
            + (
                ""
                if sum(places)
                else "; a turn behind a cache brings its own images, not those of earlier turns"
            )
        )
    rows, row, left = [], 0, list(places)
    for image, length in enumerate(lengths):
        while row < len(left) and not left[row]:
            row += 1
        if left[row] < length:
            raise UserError(
                f"sample {row}: {left[row]} image tokens are left for image {image}, which has {length}; "
                "give each sample as many <image> places as it has images"
            )
        left[row] -= length
        rows.append(row)
    return rows


def place_images(embeds: torch.Tensor, features: Sequence[torch.Tensor], layout: TokenLayout) -> torch.Tensor:
    """Return token embeddings [B, L, d] with the features of M images [N_i, d] in their places."""
    flat = torch.cat(tuple(features)).to(embeds)
    if not layout.image_lengths:  # an image that stands in for none: in the graph, in no place
        return embeds.masked_scatter(layout.image_mask[..., None], flat)  # type: ignore[index]
    embeds = embeds.clone()
    embeds.view(-1, embeds.shape[-1])[layout.image_index] = flat  # on a CPU much faster than masked_scatter
    return embeds


def place_level(embeds: torch.Tensor, level: Sequence[torch.Tensor], layout: TokenLayout) -> torch.Tensor:
    """Return [B, L, d], what a deepstack level of M images [N_i, d] adds behind a layer: 0 where there is no image token."""
    added = torch.zeros_like(embeds)
    if layout.image_lengths:
        added.view(-1, embeds.shape[-1])[layout.image_index] = torch.cat(tuple(level)).to(embeds)
    return added


def token_positions(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    valid: torch.Tensor,
    cache: SparseContextCache | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's place in its text, int64 [B or 1, L], and its position ids, [3, B, L] where they differ."""
    if position_ids is not None and position_ids.dim() == 2:
        return position_ids, position_ids
    if position_ids is not None and position_ids.shape[0] == 4:
        return position_ids[0], position_ids[1:]
    if attention_mask is not None:
        text = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -valid.shape[1] :]
    else:
        text = torch.arange(valid.shape[1], device=valid.device)[None]
        if cache is not None and cache.fed is not None:
            text = text + cache.fed
    if position_ids is not None:
        return text, position_ids
    if cache is not None and cache.offset is not None:
        return text, (text + cache.offset)[None].expand(3, -1, -1)
    return text, text


def position_offset(
    positions: torch.Tensor, valid: torch.Tensor, cache: SparseContextCache | None
) -> torch.Tensor:
    """Return int64 [B, 1], the position id behind the call's last one, less the tokens fed until then; `positions` [3, B, L]."""
    last = positions.amax(0).masked_fill(~valid, -1).amax(1, keepdim=True)
    fed = valid.sum(1, keepdim=True)
    return last + 1 - (fed if cache is None or cache.fed is None else cache.fed + fed)
