"""Tables of plain text."""

from collections.abc import Sequence
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """
    Aligns columns.

    Args:
        header (`Sequence[str]`): names of the columns.
        rows (`Sequence[Sequence]`): the cells. Floats get four digits, `None` becomes `-`.
    """
    cells = [list(header), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric)).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
