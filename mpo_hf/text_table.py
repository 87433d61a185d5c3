"""Tables of plain text, and text by others that is printed."""

import json
import unicodedata
from collections.abc import Sequence
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """
    A table with a header and a rule below it. Columns of numbers are aligned on the right, all others on the left.

    Args:
        header (`Sequence[str]`): names of the columns.
        rows (`Sequence[Sequence]`): the cells. Floats are shown with four digits, `None` as `-`.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    header = [printable(name) for name in header]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))]
    return align_columns([header, ["-" * width for width in widths], *cells], numeric)


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[bool] | None = None) -> str:
    """
    Lines of texts in columns.

    Args:
        rows (`Sequence[Sequence[str]]`): the texts.
        right (`Sequence[bool]`, *optional*): which columns are aligned on the right. None by default.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = right if right is not None else [False] * len(widths)
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)).rstrip()
        for row in rows
    )


def printable(text: str, is_name: bool = True) -> str:
    r"""
    Text that moves no cursor, sets no color and hides nothing in a terminal: `\x1b` in place of the character.

    Args:
        text (`str`): a label, a path or another name by somebody else; or the answer of a model.
        is_name (`bool`, *optional*, defaults to `True`):
            Whether what has no width or changes the direction of writing is shown too, and the text is one line. An answer
            keeps its lines, and the joiners and marks that some scripts are written with.
    """
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp") if is_name else ("Cc", "Cs")
    kept = "" if is_name else "\n\t"
    return "".join(
        char
        if char in kept or unicodedata.category(char) not in hidden
        else str(char.encode("unicode_escape"), "ascii")
        for char in text
    )


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that is safe to print: whatever [`printable`] would show, as an escape of JSON, so that nothing is lost."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(char if char == "\n" or printable(char) == char else json.dumps(char)[1:-1] for char in text)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))
