"""FasterVLM: patches by the class token's attention."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.policies.base import PatchPolicy


@dataclass(frozen=True, kw_only=True)
class FasterVLM(PatchPolicy):
    """The `n` patches (or the share `keep`) that the class token attends to most, in the layer that the projector reads."""

    name = "fastervlm"
    rule = "patches by CLS attention, before the LLM"
    source = "arXiv 2412.01818v1"
