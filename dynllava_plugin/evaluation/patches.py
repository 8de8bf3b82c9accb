"""Changes to a harness's modules that last for one command.

Who makes one says which version of the harness it was checked on; the tests that run the harnesses' own commands fail where upstream
moves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


class Patches(ExitStack):
    """Attributes that are replaced until the block ends."""

    def put(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace `owner`'s attribute `name` by what `make` makes of it; `AttributeError` where there is none."""
        inherited = isinstance(owner, type) and name not in vars(owner)
        before = vars(owner)[name] if isinstance(owner, type) and not inherited else getattr(owner, name)
        setattr(owner, name, make(before))
        if inherited:
            self.callback(delattr, owner, name)
        else:
            self.callback(setattr, owner, name, before)
