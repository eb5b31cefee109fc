"""The seeds' table: rows methods, columns macro F1 of head, middle, tail and all, distances, seconds."""

import statistics
from collections.abc import Sequence

COLUMNS = {  # key of a row: (heading, decimals)
    "head": ("head", 1), "middle": ("middle", 1), "tail": ("tail", 1), "mean": ("macro F1", 1),
    "inter": ("inter", 3), "intra": ("intra", 3), "seconds": ("seconds", 1),
}  # fmt: skip


def table(rows: Sequence[dict], key: str = "method", title: str | None = None) -> str:
    """Text of a table: one line for each value of ``key``, in order of appearance; mean and spread over the rest.

    Args:
        rows: Dictionaries with ``key``, ``seed`` and the columns; F1 in percent, None where a group has no class.
        key: What a line is about.
        title: Heading of its names.

    The spread is the sample standard deviation; a single row has none.

    Example:
        >>> from rsfast.deblora.comparison.table import table
        >>> row = dict(head=90, middle=80, tail=10, mean=60, inter=0.5, intra=0.2, seconds=1)
        >>> print(table([dict(row, method="lora", seed=0)]).splitlines()[1].split())
        ['lora', '90.0', '80.0', '10.0', '60.0', '0.500', '0.200', '1.0']
    """
    lines = {}
    for row in rows:
        lines.setdefault(row[key], []).append(row)
    cells = [[title or key, *(heading for heading, _ in COLUMNS.values())]]
    for name, found in lines.items():
        cells.append([str(name), *(_cell([row[c] for row in found], d) for c, (_, d) in COLUMNS.items())])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _cell(values: list[float], decimals: int) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{decimals}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{decimals}f}"
