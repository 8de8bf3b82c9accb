"""Our class of each family with the weights of its tiny stock model, and predictors whose decisions are far from ties."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from dynllava_plugin.model.families import FAMILIES as CLASSES
from tests.families.checkpoints import stock_model, stock_processor

KEEP = 0.4


@lru_cache
def stock_of(family: str) -> Any:
    return stock_model(family)


def model_of(family: str, attention: str = "sdpa") -> Any:
    """In eval mode, with the settings it was built with; its text predictor keeps about half of random text."""
    model, settings = _built(family, attention)
    model.config.text_config.sparsity = settings
    return model


@lru_cache
def _built(family: str, attention: str) -> tuple[Any, Any]:
    stock = stock_of(family)
    kind = CLASSES[stock.config.model_type]
    config = kind.config_class.from_dict(stock.config.to_dict())
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = kind(config).eval()
    found = model.load_state_dict(stock.state_dict(), strict=False)
    assert not found.unexpected_keys and all("predictor" in name for name in found.missing_keys)
    model.generation_config = stock.generation_config
    llm = model.model.language_model
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "predictor" in name and parameter.dim() > 1:
                parameter.mul_(8)
        seen: list[torch.Tensor] = []
        hook = llm.text_predictor.register_forward_hook(lambda module, inputs, output: seen.append(output))
        ids = torch.randint(5, 200, (4, 60), generator=torch.Generator().manual_seed(1))
        model(ids, prompt_length=8, use_cache=False)
        hook.remove()
        llm.text_predictor.head[-1].bias[1] += (seen[0][..., 0] - seen[0][..., 1]).median()
    return model, model.config.sparsity


def answers_of(family: str, batch: int, steps: int, seed: int) -> torch.Tensor:
    """int64 [batch, steps] of ordinary words of the family's vocabulary."""
    tokenizer = stock_processor(family).tokenizer
    words = [i for i in range(len(tokenizer)) if i not in set(tokenizer.all_special_ids)]
    words = [i for i in words if not tokenizer.convert_ids_to_tokens(i).startswith("<")]
    drawn = torch.randint(0, len(words), (batch, steps), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(words)[drawn]
