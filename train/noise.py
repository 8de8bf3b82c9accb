"""Gumbel noise from the run's seed, the step and the sample: whatever the batch layout, device or process."""

from __future__ import annotations

import numpy as np
import torch

from dynllava_plugin.sparsity.selection import last_answer


def gumbel_noise(
    seed: int, step: int, samples: torch.Tensor, image_tokens: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise for the two predictors' logits of one micro-batch.

    Parameters
    ----------
    seed, step : int
        The run's seed and its optimiser step.
    samples : int64 [B]
        Places in the dataset.
    image_tokens : bool [B, L]
        Where the image placeholders are.
    labels : int64 [B, L]

    Returns
    -------
    (image [B, N_img, 2], text [B, longest last answer, 2]) : float32 on the inputs' device, right padded
    """
    numbers_of_images = image_tokens.sum(1).tolist()
    lengths = last_answer(labels).sum(1).tolist()
    image = torch.zeros(len(samples), max(numbers_of_images), 2)
    text = torch.zeros(len(samples), max(lengths), 2)
    for row, sample in enumerate(samples.tolist()):
        random = np.random.default_rng([seed, step, sample])
        image[row, : numbers_of_images[row]] = torch.from_numpy(
            random.gumbel(size=(numbers_of_images[row], 2))
        )
        text[row, : lengths[row]] = torch.from_numpy(random.gumbel(size=(lengths[row], 2)))
    return image.to(labels.device), text.to(labels.device)
