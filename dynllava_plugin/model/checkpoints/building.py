"""A model with a checkpoint's weights, by transformers' own loader; what is wrong with them is one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.model.configuration import PREFIX
from dynllava_plugin.model.decoder import PREDICTORS
from dynllava_plugin.model.families import FAMILIES


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Run without transformers' table of fresh weights, which one line has said, nor its bars."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@quiet_transformers()
def empty_model(config: Any, dtype: torch.dtype, attention: str | None) -> Any:
    """Return the model on the meta device; `UserError` for an `attention` implementation that isn't there."""
    family: Any = FAMILIES[config.model_type.removeprefix(PREFIX)]
    try:
        with torch.device("meta"):
            return family._from_config(config, dtype=dtype, attn_implementation=attention)
    except (ImportError, ValueError) as error:
        if attention is None or isinstance(error, UserError):
            raise
        raise UserError(f"attn_implementation: {str(error).splitlines()[0]}") from None


@quiet_transformers()
def build(
    directory: Path,
    config: Any,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    attention: str | None = None,
    device: torch.device | None = None,
    quantization: Any = None,
    *,
    may_be_absent: Callable[[str], bool] = lambda name: False,
    may_be_fresh: bool = True,
) -> Any:
    """Return the model of a folder on `device`.

    Its weights are `tensors` under this package's names, which are not copied; a missing one that `may_be_absent`, and predictors
    that `may_be_fresh` where none is there, are drawn as transformers draws them. With a `quantization` config weights are made
    of fewer bits. Raises `UserError` for others that are missing, superfluous, damaged or of another shape, and for an attention
    implementation that isn't there.
    """
    if attention is not None:
        empty_model(config, dtype, attention)
    options: dict[str, Any] = {}
    if quantization is not None:
        options = {"quantization_config": quantization, "device_map": {"": device}}
    family: Any = FAMILIES[config.model_type.removeprefix(PREFIX)]
    try:
        model, info = family.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, attn_implementation=attention,
            ignore_mismatched_sizes=True, output_loading_info=True, **options,
        )  # fmt: skip
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{directory}: cannot be loaded ({one_line(error)})") from None
    model._weight_conversions = []  # `save_pretrained` keeps these names
    fresh = may_be_fresh and model.fresh_predictors
    missing = sorted(name for name in info["missing_keys"] if not may_be_absent(name))
    missing = [name for name in missing if not (fresh and PREDICTORS.match(name))]
    extra = sorted({*info["unexpected_keys"], *(set(tensors) - set(model.state_dict()))})
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("not part of the model", extra))
        if names
    ]
    if problems:
        raise UserError(f"{directory}: weights do not fit the model: {'; '.join(problems)}")
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{directory}: {name} has shape {list(found)}, but its config.json means {list(expected)}"
        )
    if quantization is None:  # quantised layers are where they belong
        torch.nn.Module.to(model, device)
    model.config.name_or_path = str(directory)
    return model.eval()
