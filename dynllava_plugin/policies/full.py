"""Full context: LLaVA-1.5 as it is."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Everything stays."""

    name = "full"
    rule = "everything stays"
    source = "LLaVA-1.5"
    reads_question = False
    static_prefill = True

    layer: int = 2
