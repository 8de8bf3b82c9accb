"""Comma-separated values on `dynllava bench`'s command lines."""

from __future__ import annotations

from collections.abc import Collection

from dynllava_plugin.errors import UserError


def numbers(flag: str, values: str, least: int = 1) -> list[int]:
    """Whole numbers from `least` on, in the order given, or a `UserError`."""
    try:
        found = [int(value) for value in values.split(",") if value.strip()]
    except ValueError:
        raise UserError(f"{flag}: {values!r} is not a comma-separated list of whole numbers") from None
    if not found or min(found) < least:
        raise UserError(f"{flag}: {values!r} must be positive numbers")
    return found


def chosen(flag: str, values: str, known: Collection[str]) -> list[str]:
    """Some of `known`, each once, or a `UserError`."""
    found = [value.strip() for value in values.split(",") if value.strip()]
    unknown = [value for value in found if value not in known]
    if unknown or not found:
        raise UserError(f"{flag}: {', '.join(unknown) or 'empty'}; choose from {', '.join(known)}")
    return list(dict.fromkeys(found))
