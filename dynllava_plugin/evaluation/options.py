"""A setting is one field of a dataclass: its flag, its key in a suite's file and its help text are made from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, field
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError


def option(
    text: str,
    kind: type = str,
    default: Any = None,
    choices: Sequence[str] = (),
    least: int | None = None,
    metavar: str | None = None,
    several: bool = False,
    word: str | None = None,
) -> Any:
    """Return a dataclass field.

    Parameters
    ----------
    text : str
        What it is, in one line.
    kind : type
        ``str``, ``int``, ``float`` or ``Path``.
    default
    choices : sequence of str
        What it may be; empty: anything of its kind.
    least : int, optional
        The smallest number that it may be.
    metavar : str, optional
        What stands behind its flag in the help.
    several : bool
        Whether it is a tuple: its flag takes several values.
    word : str, optional
        What may stand in place of a number.
    """
    facts = {
        "word": word,
        "help": text,
        "kind": kind,
        "choices": tuple(choices),
        "least": least,
        "metavar": metavar,
    }
    return field(default=default, metadata={**facts, "several": several})


def flag(name: str) -> str:
    """Return a setting's flag: ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def add_flags(parser: Any, settings: Iterable[Field[Any]], **changed: Mapping[str, Any]) -> None:
    """Give a parser the flag of each setting, without a default; ``--a_b`` is a spelling of ``--a-b``.

    Parameters
    ----------
    settings : iterable of Field
        As `option` makes them.
    changed : mapping
        Of a setting's name: arguments of `add_argument` in place of the usual ones.
    """
    for setting in settings:
        facts = setting.metadata
        kind = _or_word(facts["kind"], facts["word"]) if facts["word"] else facts["kind"]
        usual: dict[str, Any] = {"help": facts["help"], "type": kind, "metavar": facts["metavar"]}
        if facts["choices"]:
            usual = {"help": facts["help"], "choices": facts["choices"]}
        if facts["several"]:
            usual["nargs"] = "+"
        spellings = dict.fromkeys([flag(setting.name), f"--{setting.name}"])
        parser.add_argument(*spellings, **{**usual, **changed.get(setting.name, {})})


def checked(setting: Any, value: Any, where: Path) -> Any:
    """Return a value as the setting holds it.

    YAML turns what a user writes into lists, mappings, dates and numbers: what can't be meant is a `UserError` that names the
    setting, and the file `where` it may stand.
    """
    name, facts = setting.name, setting.metadata
    if facts["several"]:
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, str) for item in values):
            raise UserError(f"{where}: `{name}` has to be a name or a list of names, not {value!r}")
        return tuple(_chosen(setting, item) for item in values)
    if facts["word"] is not None and value == facts["word"]:
        return value
    if facts["least"] is not None:
        if type(value) is not int or value < facts["least"]:
            raise UserError(f"{flag(name)} {value}: must be a positive integer")
    elif facts["kind"] in (int, float):
        if type(value) is not int and (facts["kind"] is int or type(value) is not float):
            raise UserError(f"{where}: `{name}` has to be a number, not {value!r}")
    elif not isinstance(value, (str, Path)):
        raise UserError(f"{where}: `{name}` has to be text, not {value!r}")
    return _chosen(setting, facts["kind"](value))


def _or_word(kind: type, word: str) -> Any:
    def parsed(text: str) -> Any:
        return text if text == word else kind(text)

    parsed.__name__ = kind.__name__  # what argparse's message calls it
    return parsed


def _chosen(setting: Any, value: Any) -> Any:
    choices = setting.metadata["choices"]
    if choices and value not in choices:
        raise UserError(
            f"{flag(setting.name)}: unknown value {value!r}; choose {', '.join(choices[:-1])} or {choices[-1]}"
        )
    return value
