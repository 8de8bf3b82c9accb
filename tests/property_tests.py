"""How many cases the property tests draw: the same ones in every run of the suite, new ones and more in `make fuzz`."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

try:
    from hypothesis.internal.conjecture import providers
except ImportError:  # a version that draws without looking at modules
    providers = None

# Cases drawn anew, this many times as many; 0 for the suite's own.
TIMES = int(os.environ.get("DYNLLAVA_FUZZ", "0"))


def examples(number: int, **others: Any) -> settings:
    """Hypothesis's settings for a test that draws `number` cases in the suite."""
    return settings(max_examples=number * max(TIMES, 1), **others)


def use_profile() -> None:
    """A change is red for what it broke, never for a case that nobody had drawn before; a busy machine is no failure.

    `derandomize` alone isn't enough: Hypothesis mixes literals of the modules loaded so far into what it draws, so that any
    new literal in the package, or another choice of test files, would change the cases.
    """
    if not TIMES and hasattr(providers, "is_local_module_file"):
        providers.is_local_module_file = lambda path: False
    settings.register_profile(
        "project", deadline=None, derandomize=not TIMES, max_examples=100 * max(TIMES, 1), print_blob=True
    )
    settings.load_profile("project")
