"""What training draws, from the run's seed, the step and the sample: whatever the batch layout, device or process."""

from __future__ import annotations

import numpy as np
import torch

from dynllava_plugin.sparsity.selection import keep_rates_at, last_answer


def gumbel_noise(
    seed: int,
    step: int,
    samples: torch.Tensor,
    image_tokens: torch.Tensor,
    labels: torch.Tensor,
    gates: int = 1,
    question: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Noise for the predictors' logits of one micro-batch.

    Parameters
    ----------
    seed, step : int
        The run's seed and its optimiser step.
    samples : int64 [B]
        Places in the dataset.
    image_tokens : bool [B, L]
        Where the image placeholders are.
    labels : int64 [B, L]
    gates : int
        Gates of the image tokens.
    question : bool [B, L], optional
        Text of the last question, where it may be dropped.

    Returns
    -------
    (image [B, N_img, 2 * gates], text [B, longest last answer, 2], question [B, longest, 2] where there is one)
        float32 on the inputs' device, right padded
    """
    numbers_of_images = image_tokens.sum(1).tolist()
    lengths = last_answer(labels).sum(1).tolist()
    asked = [0] * len(lengths) if question is None else question.sum(1).tolist()
    image = torch.zeros(len(samples), max(numbers_of_images), 2 * gates)
    text, prompt = (torch.zeros(len(samples), max(counts), 2) for counts in (lengths, asked))
    for row, sample in enumerate(samples.tolist()):
        random = np.random.default_rng([seed, step, sample])
        first, output, later, words = (
            torch.from_numpy(random.gumbel(size=size))
            for size in (
                (numbers_of_images[row], 2),
                (lengths[row], 2),
                (numbers_of_images[row], 2 * (gates - 1)),
                (asked[row], 2),
            )
        )
        image[row, : numbers_of_images[row]] = torch.cat([first, later], 1)
        text[row, : lengths[row]] = output
        prompt[row, : asked[row]] = words
    drawn = (image, text) if question is None else (image, text, prompt)
    return tuple(noise.to(labels.device) for noise in drawn)


def keep_rates(seed: int, step: int, samples: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return float32 [B], a keep rate from `low` to `high` for each of the samples (int64 [B], places in the dataset)."""
    drawn = [np.random.default_rng([seed, step, sample, 1]).random() for sample in samples.tolist()]
    return keep_rates_at(torch.tensor(drawn, device=samples.device, dtype=torch.float64), low, high)
