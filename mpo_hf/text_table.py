"""Tables of plain text."""

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
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = right if right is not None else [False] * len(widths)
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)).rstrip()
        for row in rows
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
