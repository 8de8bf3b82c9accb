"""The one error type that command lines turn into a single line."""


class UserError(ValueError):
    """Something a user can fix: the message is one line that names the file, sample or flag and what to do."""
