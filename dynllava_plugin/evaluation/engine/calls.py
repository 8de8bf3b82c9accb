"""What a batch's calls of the model have in common: its inputs, its images, the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dynllava_plugin.evaluation.engine.costs import CachedDecoder, OutputCost, output_cost
from dynllava_plugin.evaluation.engine.encoding import Encoder
from dynllava_plugin.evaluation.engine.prefetch import Prepared
from dynllava_plugin.policies import Policy


class Calls:
    """A model with its processor, called batch by batch.

    Parameters
    ----------
    model, processor
        As `load_model` gives them.
    encoder : Encoder
        Theirs.

    Attributes
    ----------
    seconds : float
        Inside the model so far.
    shared_prompts : int
        Prompts so far of batches that prefilled what they begin with alike once.
    eos_ids : int64 [E]
        Tokens that end an answer.
    """

    def __init__(self, model: Any, processor: Any, encoder: Encoder) -> None:
        self.model, self.processor, self.encoder = model, processor, encoder
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

    def inputs(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """The batch as arguments of the model, its images encoded where that is done apart."""
        with self.clock():
            return self.encoder.batch(batch)

    @property
    def policy(self) -> Policy:
        """Who decides what stays, by the settings in force."""
        return self.model.model.language_model.policy

    def columns(self, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Character spans as token spans, counted from the end (negative; 0 is the end itself).

        Counted from the end because images, which stand before them, become many tokens, and padding is left.
        """
        count = self.encoder.token_count
        total = count(text)
        return [(count(text[:start]) - total, count(text[:end]) - total) for start, end in spans]

    def cost(self, dense: int, sparse: int, keep: list[bool]) -> OutputCost | None:
        """As `output_cost`; None under a policy whose cache isn't split at one layer for good."""
        if self.policy.sequential or self.policy.at_input or len(self.policy.splits) > 1:
            return None
        return output_cost(replace(self._decoder, sparse_layer=self.policy.gate_layer), dense, sparse, keep)
