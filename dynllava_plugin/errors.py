"""The one error type that command lines turn into a single line."""


class UserError(ValueError):
    """Something a user can fix: the message is one line that names the file, sample or flag and what to do."""


def reason_in(log: str) -> str:
    """Why a command of ours failed, from what it printed: its last ``error:`` line, or else its last line."""
    lines = [line for line in log.strip().splitlines() if line.strip()] or ["it wrote nothing"]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ").strip()
