"""Changes to a harness's modules that last for one command.

Who makes one says which version of the harness it was checked on; the tests that run the harnesses' own commands fail where upstream
moves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch


class Patches(ExitStack):
    """Attributes that are replaced until the block ends."""

    def put(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace `owner`'s attribute `name` by what `make` makes of it; `AttributeError` where there is none."""
        self.enter_context(patch.object(owner, name, make(getattr(owner, name))))
