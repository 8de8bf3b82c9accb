"""Texts of others, names of checkpoints above all, in Markdown and LaTeX: they show as they are and break no table."""

_LINES = {"\n": " ", "\r": " "}
# For `str.translate`: a table's cell or a line of Markdown, one line without a bar of a table or HTML.
MARKDOWN = str.maketrans({**_LINES, "|": r"\|", "&": "&amp;", "<": "&lt;", ">": "&gt;"})
_NAMED = {"\\": "backslash", "^": "asciicircum", "~": "asciitilde", "|": "bar", "<": "less", ">": "greater"}
# A cell of a LaTeX table, one line without a character that LaTeX reads as a command.
LATEX = str.maketrans(
    {
        **_LINES,
        **{character: rf"\{character}" for character in "_%&#${}"},
        **{character: rf"\text{name}{{}}" for character, name in _NAMED.items()},
    }
)
