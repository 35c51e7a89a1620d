"""CSV files of the stages, read with a sentence for what is damaged."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from apiq.errors import ApiqError
from apiq.reporting.units import known


def rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file by column.

    Raises:
        ApiqError: one of `columns` is not in it.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ApiqError(f"{path} is damaged: it has no column {missing[0]}.")
        return list(reader)


def value(path: Path, row: Mapping[str, str], column: str) -> float | None:
    """The number in a cell; None where it is empty or not finite.

    Raises:
        ApiqError: it is no number.
    """
    try:
        found = float(row[column] or "nan")
    except (TypeError, ValueError):
        raise ApiqError(f"{path} is damaged: {row[column]!r} in column {column} is not a number.") from None
    return found if known(found) else None
