"""The order of the samples: from seed and epoch alone, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


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
        Where given, each global batch is sorted by them: its passes pad less, and what is in it stays drawn at random.
    """

    def __init__(self, samples: int, global_batch: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self.samples, self.global_batch, self.seed, self.lengths = samples, global_batch, seed, lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set which epoch's order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.samples // self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        batches = np.resize(
            random.permutation(self.samples), (len(self) // self.global_batch, self.global_batch)
        )
        if self.lengths is not None:
            longest_first = np.argsort(-self.lengths[batches], axis=1, kind="stable")
            batches = np.take_along_axis(batches, longest_first, axis=1)
        return iter(batches.ravel().tolist())
