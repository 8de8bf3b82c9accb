"""Position ids on three axes (M-RoPE), as Qwen2.5-VL and Qwen3-VL have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.modeling import SparseVLM
from dynllava_plugin.sparsity.cache import CACHE_NAME, SparseContextCache

# What positions are made of, beside the ids.
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class TurnedPositions(SparseVLM):
    """A family whose images turn on three axes: positions come from the images' grids, later ones from the cache's offset."""

    image_needs = ("pixel_values", "image_grid_thw")
    video_needs = ("pixel_values_videos", "video_grid_thw")

    def pixels_of_each(self, pixels: torch.Tensor, visuals: dict[str, Any]) -> Sequence[torch.Tensor]:
        """Return each image's or video's patches of `pixels` [patches of all, d]."""
        grid = visuals["image_grid_thw" if "image_grid_thw" in visuals else "video_grid_thw"]
        return pixels.split(grid.prod(-1).tolist())

    def positions(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: SparseContextCache | None,
        images: dict[str, Any],
    ) -> torch.Tensor:
        """Return int64 [3, B, L], the position ids of a call with images or videos.

        Raises `UserError` for encoded ones without their grids, or without `input_ids`.
        """
        if input_ids is None:
            raise UserError("inputs_embeds: the positions of image tokens are made of input_ids; pass those")
        grids = {name: images[name] for name in GRIDS if images.get(name) is not None}
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        kinds = (input_ids == self.config.image_token_id).int()
        kinds += 2 * (input_ids == self.config.video_token_id).int()
        try:
            positions, _ = self.model.get_rope_index(  # type: ignore[operator]
                input_ids, mm_token_type_ids=kinds, attention_mask=mask, **grids
            )
        except (TypeError, StopIteration, RuntimeError) as error:  # none at all, too few, or of other images
            raise UserError(
                "image_grid_thw, video_grid_thw: not those of the image and video tokens in input_ids, whose positions are made "
                "of them; pass everything that the checkpoint's processor returns"
            ) from error
        return positions if cache is None or cache.fed is None else positions + cache.next_positions()

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Return int64 [4, B, L], places in the text first; behind a cache by its offset, not by the module's last call's.

        On padding behind a prompt stands its last position, from which `generate` counts on.
        """
        cache: Any = model_kwargs.get(CACHE_NAME)
        mask = model_kwargs["attention_mask"]
        grids = {name: model_kwargs[name] for name in GRIDS if model_kwargs.get(name) is not None}
        text = (mask.long().cumsum(-1) - 1).clamp(min=0)
        ids = model_kwargs.get("input_ids", inputs_tensor)  # empty beside inputs_embeds alone
        if grids or model_kwargs.get("mm_encoder_outputs"):  # cached columns are sliced away again
            seen = 0 if cache is None else cache.seen
            new = self.positions(ids[:, seen:] if ids.shape[1] else None, mask, cache, grids)
            turned = torch.nn.functional.pad(new, (seen, 0))
            turned = turned.where(mask.bool(), turned.amax((0, 2), keepdim=True))
        else:
            offset = getattr(cache, "offset", None)
            turned = (text if offset is None else text + offset).expand(3, -1, -1)
        return torch.cat([text[None], turned])
