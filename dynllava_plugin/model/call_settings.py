"""Settings of one call: what a caller asked for, whatever other threads set or ask for meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dynllava_plugin.sparsity.config import SparsityConfig

# By the decoder's identity: a call may run another model inside.
_SETTINGS: ContextVar[dict[int, SparsityConfig] | None] = ContextVar("sparsity_of_this_call", default=None)


@contextmanager
def settings_of_call(decoder: Any, settings: SparsityConfig) -> Iterator[None]:
    """Let `decoder` run under `settings` in this thread (or task), until the block ends."""
    token = _SETTINGS.set({**(_SETTINGS.get() or {}), id(decoder): settings})
    try:
        yield
    finally:
        _SETTINGS.reset(token)


def call_settings(decoder: Any) -> SparsityConfig | None:
    """Return the settings of the call that this thread (or task) is in; None outside of one."""
    return (_SETTINGS.get() or {}).get(id(decoder))
