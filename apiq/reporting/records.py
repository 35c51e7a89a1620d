"""CSV and JSON files of the stages, read with a sentence for what is damaged."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apiq.errors import ApiqError
from apiq.files import read_json
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


def mapping(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ApiqError: it holds no JSON, or JSON of another shape.
    """
    return mapping_in(path, {"its content": read_json(path)}, "its content")


def mapping_in(path: Path, holder: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object at `key` of an object of a JSON file; empty where it is missing.

    Raises:
        ApiqError: it is no object.
    """
    found = holder.get(key, {})
    if not isinstance(found, dict):
        raise ApiqError(f"{path} is damaged: {key} is no JSON object; run the stage that writes it again.")
    return found


def listed(path: Path, holder: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of objects at `key` of an object of a JSON file; empty where it is missing.

    Raises:
        ApiqError: it is no list of objects.
    """
    found = holder.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ApiqError(f"{path} is damaged: {key} is no list of JSON objects; run the stage that writes it again.")
    return found
