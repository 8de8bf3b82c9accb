"""Texts of others, names of checkpoints above all, in Markdown and LaTeX: they show as they are and break no table."""

_LINES = {"\n": " ", "\r": " "}
_MARKDOWN = str.maketrans({**_LINES, "|": r"\|", "&": "&amp;", "<": "&lt;", ">": "&gt;"})
_NAMED = {"\\": "backslash", "^": "asciicircum", "~": "asciitilde", "|": "bar", "<": "less", ">": "greater"}
_LATEX = str.maketrans(
    {
        **_LINES,
        **{character: rf"\{character}" for character in "_%&#${}"},
        **{character: rf"\text{name}{{}}" for character, name in _NAMED.items()},
    }
)


def in_markdown(text: str) -> str:
    """Return `text` as a table's cell or in a line of Markdown: one line, no bar of a table, no HTML."""
    return text.translate(_MARKDOWN)


def in_latex(text: str) -> str:
    """Return `text` as a cell of a LaTeX table: one line, no character that LaTeX reads as a command."""
    return text.translate(_LATEX)
