"""Every other output token: the paper's structured control."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.policies.base import Choice, Gate, OutputPolicy, argument, count


@dataclass(frozen=True, kw_only=True)
class Structure(OutputPolicy):
    """Output tokens whose position is a multiple of `period` stay; image tokens all stay."""

    name = "structure"
    rule = "every other output token"
    source = "arXiv 2412.00876, baselines"

    period: int = argument(2, count)

    @property
    def output_share(self) -> float:
        """Return the share of a long answer."""
        return 1 / self.period

    def keep_output(self, gate: Gate) -> Choice:
        """Decide by the position id, so that every way to decode keeps the same tokens."""
        return Choice(gate.of_output(gate.position_ids.expand_as(gate.valid)) % self.period == 0)
