"""How weights are shared out over processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments
from transformers.integrations import deepspeed
from transformers.utils import strtobool

WHOLE, FSDP = "one process or DDP", "FSDP"


def sharding(args: TrainingArguments) -> str:
    """Who can read a checkpoint, in words: FSDP's and DeepSpeed's hold pieces that nothing else puts together."""
    plugin = args.deepspeed_plugin
    if plugin is not None:
        stage = plugin.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        return f"DeepSpeed ZeRO-{stage} with {args.world_size} process(es)"
    return FSDP if args.fsdp or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")) else WHOLE


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
