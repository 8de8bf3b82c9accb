"""How many cases the property tests draw: the same ones in every run of the suite, new ones and more in `make fuzz`."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

# Cases drawn anew, this many times as many; 0 for the suite's own.
TIMES = int(os.environ.get("DYNLLAVA_FUZZ", "0"))


def examples(number: int, **others: Any) -> settings:
    """Hypothesis's settings for a test that draws `number` cases in the suite."""
    return settings(max_examples=number * max(TIMES, 1), **others)


def use_profile() -> None:
    """A change is red for what it broke, never for a case that nobody had drawn before; a busy machine is no failure."""
    settings.register_profile(
        "project", deadline=None, derandomize=not TIMES, max_examples=100 * max(TIMES, 1), print_blob=True
    )
    settings.load_profile("project")
