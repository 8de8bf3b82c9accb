"""What a call asks of the host beside transformers' own LLaVA of 32 layers: `python -m tests.host_costs [results/efficiency/host.md]`.

Operations and waits are counted, which the suite does too; the time is Python's, almost alone: layers are 32 wide, on one thread.
On a GPU, eager decoding waits for it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dynllava_plugin import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynllava_plugin.environment import host, versions
from dynllava_plugin.files import write_text
from tests.op_counts import counted

TEXT = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
SHELL = dict(
    vision_config=dict(
        model_type="clip_vision_model", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=7, intermediate_size=32, projection_dim=16,
    ),
    image_token_index=90,
    image_seq_length=16,
)  # fmt: skip
PREDICTORS = dict(vision_keep_rate=0.3, predictor_dim=32, predictor_heads=4, predictor_ffn_dim=64)
STOCK, POLICIES, REPEATS = "stock LLaVA", ("full", "image", "image_text", "fastv,k=3"), 60


def models() -> tuple[Any, Any]:
    """The stock model and ours, of one shape."""
    stock = LlavaConfig(text_config=dict(model_type="llama", **TEXT), **SHELL)
    ours = DynamicLlavaConfig(
        text_config=dict(model_type="dynamic_llama", sparsity=PREDICTORS, **TEXT), **SHELL
    )
    return LlavaForConditionalGeneration(stock).eval(), DynamicLlavaForConditionalGeneration(ours).eval()


def prefill(model: Any, batch: int) -> Any:
    """The output on prompts of one image; of two lengths where `batch` is 2."""
    ids = torch.tensor([[3, 4, 1, *[90] * 16, 5, 6, 7]] * batch)
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    pixels = torch.zeros(batch, 3, 28, 28)
    return model(ids, attention_mask=mask, pixel_values=pixels, use_cache=True, logits_to_keep=1)


def step(model: Any, cache: Any, batch: int, fed: int) -> Any:
    """The output of a decode step behind `fed` others."""
    mask = torch.ones(batch, 22 + fed + 1, dtype=torch.long)
    mask[1:, :2] = 0
    token = torch.full((batch, 1), 7)
    return model(token, attention_mask=mask, past_key_values=cache, logits_to_keep=1)


def counts(model: Any, batch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(ops, host reads) of a prefill and of a later decode step."""
    with counted() as first:
        cache = prefill(model, batch).past_key_values
    for fed in range(2):
        with counted() as later:
            step(model, cache, batch, fed)
    return (first.ops, first.reads), (later.ops, later.reads)


class _Timed:
    """A model in a mode, whose cache grows by a step a call; a fresh one every 64."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model, self.cache, self.fed = name, model, None, 64

    def ready(self) -> None:
        if self.name != STOCK:
            self.model.set_sparsity(policy=self.name)
        if self.fed == 64:
            self.cache, self.fed = prefill(self.model, 1).past_key_values, 0

    def step(self) -> None:
        step(self.model, self.cache, 1, self.fed)
        self.fed += 1


def cpu_seconds(timed: dict[str, _Timed], call: Callable[[_Timed], Any], repeats: int) -> dict[str, float]:
    """Median of this thread's own CPU time for each model, the models in turns: who else wants the core doesn't count."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(-3, repeats):
        for name, one in timed.items():
            one.ready()
            start = time.thread_time()
            call(one)
            times[name] += [time.thread_time() - start] if turn >= 0 else []
    return {name: median(taken) for name, taken in times.items()}


@torch.no_grad()
def costs() -> pd.DataFrame:
    """A row a model and policy, for one prompt."""
    stock, ours = models()
    timed = {name: _Timed(name, stock if name == STOCK else ours) for name in (STOCK, *POLICIES)}
    prefills = cpu_seconds(timed, lambda one: prefill(one.model, 1), REPEATS)
    steps = cpu_seconds(timed, _Timed.step, REPEATS * 4)
    rows = []
    for name, one in timed.items():
        one.ready()
        found: dict[str, Any] = {"": name}
        for what, (ops, waits), taken in zip(
            ("prefill", "step"), counts(one.model, 1), (prefills, steps), strict=True
        ):
            found |= {f"{what}: operations": str(ops), f"{what}: waits": str(waits)}
            found |= {f"{what}: ms of Python": f"{taken[name] * 1e3:.1f} ({taken[name] / taken[STOCK]:.2f})"}
        rows.append(found)
    return pd.DataFrame(rows)


def main(arguments: list[str]) -> None:
    """Print the table, or write it to the file that is named."""
    torch.set_num_threads(1)
    about = f"{host()['processor']}, one thread; torch {versions()['torch']}, transformers {versions()['transformers']}"
    table = costs().to_markdown(index=False, disable_numparse=True)
    parts = ["# What a call asks of the host", (__doc__ or "").strip()]
    text = "\n\n".join(
        [
            *parts,
            f"Medians of CPU time, the models in turns, in brackets over stock LLaVA's; {about}.",
            table,
            "",
        ]
    )
    if arguments:
        write_text(Path(arguments[0]), text)
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
