"""The supported families, one short file each, which says only what differs.

`FAMILIES` has them by the `model_type` of their stock config; importing this package registers them with transformers.
All of them at once: beside torch and transformers' own modules they take a tenth of the time.
"""

from dynllava_plugin.model.families import (  # noqa: F401
    internvl,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    mistral3,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    qwen3_vl_moe,
)
from dynllava_plugin.model.families.registration import FAMILIES

__all__ = ["FAMILIES"]
