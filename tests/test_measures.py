"""What a training step's log is made of, against sums by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynllava_plugin.sparsity.config import SparsityConfig
from train import measures
from train.measures import Measures


class Alone:
    """Of accelerate's `Accelerator` in one process."""

    device = torch.device("cpu")

    def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values


def test_rates_spread_and_speed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 50 and 49 tokens: the second is too short to count; two images; 2 of 10 seconds are saving."""
    clock = iter([0.0, 3.0, 5.0, 10.0])
    monkeypatch.setattr(measures.time, "monotonic", lambda: next(clock))
    log = Measures(SparsityConfig(mode="image_text", min_text_length=50))
    with log.paused():
        pass
    labels = torch.full((2, 60), -100)
    labels[0, 10:], labels[1, 11:] = 7, 7
    text = torch.zeros(2, 50, dtype=torch.bool)
    text[0, :20], text[1, :40] = True, True
    images = torch.zeros(2, 10, dtype=torch.bool)
    images[0, :2], images[1, :6] = True, True
    outputs: Any = SimpleNamespace(
        image_keep=images, image_keep_loss=torch.tensor(0.5), text_keep=text, text_keep_loss=torch.tensor(0.1),
        prompt_keep=None,
    )  # fmt: skip
    places = torch.ones(2, 10, dtype=torch.bool)
    log.add(
        outputs,
        torch.tensor([0, 1]),
        places,
        labels,
        torch.tensor(120),
        (torch.tensor(30.0), torch.tensor(10)),
    )
    found = log.take(Alone(), step=4, max_steps=10)
    wanted = {
        "lm_loss": 3.0, "image_keep_loss": 0.5, "text_keep_loss": 0.1, "image_keep_rate": 0.4, "image_keep_rate_std": 0.2,
        "text_keep_rate": 0.4, "text_keep_rate_std": 0.0, "samples_per_second": 2 / 8, "tokens_per_second": 120 / 8,
        "hours_left": 6 * 8 / 4 / 3600,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-3)
    assert log.take(Alone(), 5, 10) == {}
