"""The order of the samples: from seed and epoch alone, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

GROUPED_BATCHES = 50  # global batches that are sorted by length together


class EpochSampler(Sampler[int]):
    """A shuffle of all samples per epoch, cut into global batches of one size.

    Each run of `global_batch` numbers is one optimiser step. Processes take them in turns, so that a step sees the
    same samples on one GPU as on 64, and a resumed run goes on where the order was left. The first samples of the
    epoch fill up its last global batch.

    Parameters
    ----------
    samples : int
    global_batch : int
    seed : int
    lengths : int64 [samples], optional
        Where given, samples of about the same length share a global batch (less padding).
    """

    def __init__(self, samples: int, global_batch: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self.samples, self.global_batch, self.seed, self.lengths = samples, global_batch, seed, lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.samples // self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self.samples)
        if self.lengths is not None:
            order = self._grouped(order, random, self.lengths)
        return iter(np.resize(order, len(self)).tolist())

    def _grouped(self, order: np.ndarray, random: np.random.Generator, lengths: np.ndarray) -> np.ndarray:
        """The shuffle with each stretch of `GROUPED_BATCHES` batches sorted by length, then batches shuffled."""
        span = GROUPED_BATCHES * self.global_batch
        stretches = [order[start : start + span] for start in range(0, len(order), span)]
        order = np.concatenate(
            [stretch[np.argsort(-lengths[stretch], kind="stable")] for stretch in stretches]
        )
        full = len(order) // self.global_batch * self.global_batch
        batches = order[:full].reshape(-1, self.global_batch)
        return np.concatenate([batches[random.permutation(len(batches))].ravel(), order[full:]])
