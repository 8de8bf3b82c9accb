"""Work that every process does, or one of them, and all hear about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from dynllava_plugin.errors import UserError

T = TypeVar("T")


def gather(value: Any) -> list[Any]:
    """Return every process's value, in order of rank; called on all of them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def from_the_first(work: Callable[[], T]) -> T:
    """Return what `work` gives process 0, which alone does it; `UserError` on all where it raises one."""
    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    return gather(together(lambda: work() if first else None))[0]


def together(work: Callable[[], T]) -> T:
    """Return this process's result of `work`, once all processes are through with theirs.

    Raises
    ------
    UserError
        Any process raised one: all raise the first of them, since none could go on without it.
    """
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    for found in gather(problem):
        if found is not None:
            raise UserError(found)
    return result  # type: ignore[return-value]
