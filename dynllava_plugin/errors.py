"""The one error type that command lines turn into a single line, and what such lines say."""

import difflib
from collections.abc import Iterable
from importlib.util import find_spec

# What the errors of a machine that can't reach the hub or a kit's server have in their name or text.
UNREACHABLE = (
    "Couldn't reach",
    "ConnectionError",
    "DatasetNotFoundError",
    "OfflineModeIsEnabled",
    "Cannot find data directory",
    "URLError",
    "Name or service not known",
    "Temporary failure in name resolution",
    "LocalEntryNotFoundError",
    "LocalTokenNotFoundError",
)


class UserError(ValueError):
    """Something a user can fix: the message is one line that names the file, sample or flag and what to do."""


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """``did you mean A or B?`` for a misspelt name; `otherwise` where nothing is like it."""
    spelled = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)
    close = close or sorted(item for item in spelled if name.lower() in item)[:3]
    return "did you mean " + " or ".join(spelled[item] for item in close) + "?" if close else otherwise


def one_line(error: BaseException, most: int = 160) -> str:
    """Return what an error says as one line of at most `most` characters; its type's name where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def reason_in(log: str) -> str:
    """Why a command of ours failed, from what it printed: its last ``error:`` line, or else its last line."""
    lines = [line for line in log.strip().splitlines() if line.strip()] or ["it wrote nothing"]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ").strip()


def check_installed(what: str, extra: str, *packages: str) -> None:
    """Raise `UserError` where one of `packages`, which `what` needs and the extra `extra` brings, can't be imported."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"{what}: {', '.join(missing)} not installed; pip install 'dynllava-plugin[{extra}]'")
