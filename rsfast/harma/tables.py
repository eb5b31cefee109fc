"""Rows of JSON and CSV files, and what is said of those that are wrong."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path


def read_json(path: Path):
    """The content of a JSON file; ``ValueError`` names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, brackets without end
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from error


def require(row, keys: Sequence[str], where: str) -> None:
    """Refuse what is no dictionary with these keys."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a dictionary, got {described(row)}")
    missing = [key for key in keys if key not in row]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; it has {', '.join(map(str, row)) or 'nothing'}")


def described(value) -> str:
    """Type and beginning of a value, for messages."""
    return f"{type(value).__name__} {str(value)[:40]!r}"


def csv_rows(
    path: Path, columns: Sequence[str], separator: str | None = None, encoding: str | None = None
) -> Iterator[tuple[str, dict]]:
    """Where each row stands, and the row by the names of the header.

    Args:
        path: A file with a header line.
        columns: Without these no row is of use.
        separator: Default: whichever of tab, comma and semicolon gives the header most of ``columns``.
        encoding: Default: UTF-8, or where that fails GB18030.

    Raises:
        ValueError: A column is missing, a line is too short, or the file cannot be read; file and line are named.
    """
    content = path.read_bytes()
    for name in [encoding] if encoding else ["utf-8-sig", "gb18030"]:
        try:
            text = content.decode(name)
            break
        except (UnicodeDecodeError, LookupError) as error:
            problem = error
    else:
        raise ValueError(f"{path} cannot be read as {encoding or 'UTF-8 or GB18030'}: {problem}")
    header = io.StringIO(text, newline=None).readline().rstrip("\n")

    def lacking(mark):
        found = next(csv.reader([header], delimiter=mark), [])
        return [column for column in columns if column not in found]

    separator = {"\\t": "\t", "tab": "\t"}.get(separator, separator) or min("\t,;", key=lambda mark: len(lacking(mark)))
    if len(separator) != 1:
        raise ValueError(f"csv_separator must be one character, got {separator!r}")
    if lacking(separator):
        raise ValueError(f"{path}: no column {' and no column '.join(lacking(separator))} in its header {header!r}")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            short = [column for column in columns if row[column] is None]
            if short:
                raise ValueError(f"{where}: the line is too short, it has no {' and no '.join(short)}")
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
