"""Flags of `dynllava bench`, each with what its value has to be: read before anything else is done."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from dynllava_plugin.errors import UserError

Kind = Callable[[str, str], Any]  # of a flag and what stands behind it


class Flags:
    """A parser's flags. `kind(flag, text)` returns what a flag's text means, or raises `UserError`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser, self.kinds = parser, dict[str, Callable[[str], Any]]()
        parser.set_defaults(kinds=self.kinds)

    def add(
        self, flag: str, text: str, default: str | None = None, kind: Kind | None = None, **more: Any
    ) -> None:
        """Add a flag whose help ends with its default, where it has one."""
        shown = text if default is None else f"{text} (default: {default})"
        action = self.parser.add_argument(flag, help=shown, default=default, **more)
        if kind is not None:
            self.kinds[action.dest] = partial(kind, flag)


def read(args: argparse.Namespace) -> None:
    """Put what they mean in place of the texts in `args`; a `UserError` names the flag of a wrong one."""
    for name, kind in args.kinds.items():
        text = getattr(args, name)
        if text is not None:
            setattr(args, name, kind(text))


def at_least(least: float, number: type = int) -> Kind:
    """Return the kind of a number from `least` on."""

    def checked(flag: str, text: str) -> Any:
        try:
            value = number(text)
        except ValueError:
            raise UserError(f"{flag}: {text!r} is not {'a whole' if number is int else 'a'} number") from None
        if not value >= least:  # nor is NaN
            raise UserError(f"{flag}: {value} is less than {least}")
        return value

    return checked


def numbers(least: int) -> Kind:
    """Return the kind of comma-separated whole numbers from `least` on, which keep their order."""

    def checked(flag: str, text: str) -> list[int]:
        try:
            found = [int(value) for value in text.split(",") if value.strip()]
        except ValueError:
            raise UserError(f"{flag}: {text!r} is not a comma-separated list of whole numbers") from None
        if not found or min(found) < least:
            raise UserError(f"{flag}: {text!r} must be numbers of at least {least}")
        return found

    return checked


def some_of(known: Collection[str]) -> Kind:
    """Return the kind of comma-separated names of `known`, each taken once."""

    def checked(flag: str, text: str) -> list[str]:
        found = [value.strip() for value in text.split(",") if value.strip()]
        unknown = [value for value in found if value not in known]
        if unknown or not found:
            raise UserError(f"{flag}: {', '.join(unknown) or 'empty'}; choose from {', '.join(known)}")
        return list(dict.fromkeys(found))

    return checked


def share(flag: str, text: str) -> float:
    """Return a number above 0 and up to 1."""
    value = at_least(float("-inf"), float)(flag, text)
    if not 0 < value <= 1:
        raise UserError(f"{flag}: {value} is outside (0, 1]; nothing would be kept, or more than there is")
    return value
