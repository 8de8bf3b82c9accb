"""What a batch's calls of the model have in common: its inputs, its images, the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dynllava_plugin.evaluation.costs import CachedDecoder, OutputCost, output_cost
from dynllava_plugin.evaluation.features import ImageFeatures
from dynllava_plugin.evaluation.prefetch import Prepared
from dynllava_plugin.policies import Policy


class Calls:
    """A model with its processor, called batch by batch.

    Parameters
    ----------
    model : DynamicLlavaForConditionalGeneration
    processor : DynamicLlavaProcessor

    Attributes
    ----------
    seconds : float
        Inside the model so far.
    shared_prompts : int
        Prompts so far of batches that prefilled what they begin with alike once.
    eos_ids : int64 [E]
        Tokens that end an answer.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.features = ImageFeatures(model)
        self.seconds, self.shared_prompts = 0.0, 0
        self._decoder = CachedDecoder.of(model)
        eos = model.generation_config.eos_token_id
        eos = processor.tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = torch.tensor(eos if isinstance(eos, list) else [eos])

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Around what the model does."""
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.seconds += time.perf_counter() - started

    def images(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """``mm_encoder_outputs`` of the batch's images in order; empty where it has none."""
        with self.clock():
            return self.features.of([image for item in batch for image in item.images])

    def inputs(self, batch: Sequence[Prepared], features: dict[str, Any]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, int64 [B, L], padded on the left; an image becomes a token a feature."""
        image, pad = self.model.config.image_token_id, self.processor.tokenizer.pad_token_id
        tokens = features["image"].pooler_output.shape[1] if features else 0
        rows = [
            [token for token in item.ids for _ in range(tokens if token == image else 1)] for item in batch
        ]
        width = max(map(len, rows))
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=self.model.device),
            "attention_mask": torch.tensor(mask, device=self.model.device),
        }

    @property
    def policy(self) -> Policy:
        """Who decides what stays, by the settings in force."""
        return self.model.model.language_model.policy

    def columns(self, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Character spans as token spans, counted from the end (negative; 0 is the end itself).

        Counted from the end because images, which stand before them, become many tokens, and padding is left.
        """
        total = self._token_count(text)
        return [(self._token_count(text[:s]) - total, self._token_count(text[:e]) - total) for s, e in spans]

    def cost(self, dense: int, sparse: int, keep: list[bool]) -> OutputCost | None:
        """As `output_cost`; None under a policy whose cache isn't split at one layer for good."""
        if self.policy.sequential or self.policy.at_input or len(self.policy.splits) > 1:
            return None
        return output_cost(replace(self._decoder, sparse_layer=self.policy.gate_layer), dense, sparse, keep)

    def _token_count(self, text: str) -> int:
        return len(self.processor.tokenizer(self.processor.prepare_text(text))["input_ids"])
