"""Loading a model for DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within, a model is built whole on every process, though ZeRO-3 will shard it.

    transformers would shard it while it is built, layer by layer; the readers of the checkpoint layouts compare
    and rename whole tensors. DeepSpeed shards what it is given when training starts.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
