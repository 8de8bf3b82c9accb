"""The vision tower's output, computed once for an image that several questions are about."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynllava_plugin.evaluation.engine.prefetch import PreparedImage

_CAPACITY = 256 * 2**20  # bytes: 54 images of LLaVA-1.5 7B in bfloat16


class ImageFeatures:
    """Image features by image, the latest ones kept.

    Parameters
    ----------
    model : DynamicLlavaForConditionalGeneration
    capacity : int
        Bytes.
    """

    def __init__(self, model: Any, capacity: int = _CAPACITY) -> None:
        self._model, self._capacity = model, capacity
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._settings: Any = None
        self.computed = 0  # images that went through the vision tower

    def of(self, images: Sequence[PreparedImage]) -> dict[str, Any]:
        """``{"image": features [M, N, d]}`` of M images in order, as the model takes them; empty without images."""
        if not images:
            return {}
        settings = self._model.config.sparsity
        if settings != self._settings:  # some policies reduce the patches themselves
            self._kept.clear()
            self._bytes, self._settings = 0, settings
        missing = {image.key: image.pixels for image in images if image.key not in self._kept}
        if missing:
            pixels = torch.stack(list(missing.values())).to(self._model.device, self._model.dtype)
            encoded = self._model.get_image_features(pixel_values=pixels, return_dict=True)
            for key, features in zip(missing, encoded.pooler_output, strict=True):
                self._kept[key] = features
                self._bytes += features.nbytes
            self.computed += len(missing)
        for image in images:
            self._kept.move_to_end(image.key)
        stacked = torch.stack([self._kept[image.key] for image in images])
        while self._bytes > self._capacity and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return {"image": BaseModelOutputWithPooling(pooler_output=stacked)}
