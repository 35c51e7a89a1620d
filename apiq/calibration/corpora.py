"""A corpus is one long text: rows of files, of a data set on the hub or of the demo, joined by a separator."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apiq.errors import ApiqError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

NAMES = ("demo", "wikitext2", "c4", "ptb", "pile")
"""Corpora that go by a name; a file or folder of such a name is meant by `./NAME`."""
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from."""

    name: str
    """The source as it was asked for."""
    text: str = field(repr=False)
    """The rows, joined."""
    sha256: str
    """Hexadecimal SHA-256 of the text in UTF-8."""
    origin: str
    """What was read: files, or repository, configuration and split."""


def load_corpus(source: str, *, split: str, column: str = "text", join: str = "\n") -> Corpus:
    """Read a corpus.

    Args:
        source: `demo`, `wikitext2`, `c4`, `ptb` or `pile`, with `:SPLIT` behind the name for one split of it; or a
            .txt (one row, as it is), .jsonl or .parquet file, or a folder of such files, which are read in the order
            of their names.
        split: the split of a name that has none behind it.
        column: column or key of the text in .parquet and .jsonl files.
        join: what stands between rows.

    Raises:
        ApiqError: the source is missing, empty or damaged, or has no such split or column; with file and line.
    """
    named = re.fullmatch(rf"({'|'.join(NAMES)})(?::(.+))?", source)
    if named:
        rows, origin = _named(named[1], named[2], split)
    else:
        rows, origin = _files(Path(source), column)
    text = join.join(rows)
    if not text.strip():
        raise ApiqError(f"the corpus {source} is empty; give one with text in it.")
    return Corpus(source, text, hashlib.sha256(text.encode()).hexdigest(), origin)


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The text in the named columns of a .jsonl or .parquet file, row by row.

    Raises:
        ApiqError: the file is damaged, or a row has no text in one of the columns; with file and line.
    """
    return _parquet_rows(path, columns) if path.suffix == ".parquet" else _jsonl_rows(path, columns)


def files_of(source: Path, suffixes: Iterable[str], names: Iterable[str] = ()) -> list[Path]:
    """The file `source`, or the files with one of the suffixes below the folder `source`, by name; no hidden ones.

    Args:
        source: a file or folder.
        suffixes: which files are meant.
        names: what could have been given instead, for the refusal.

    Raises:
        ApiqError: there is no such file, or nothing of these kinds in the folder.
    """
    allowed = " or ".join(suffixes)
    if source.is_dir():
        found = (path for path in source.rglob("*") if path.suffix in suffixes and path.is_file())
        files = sorted(path for path in found if not _hidden(path.relative_to(source)))
        if not files:
            raise ApiqError(f"the folder {source} holds no {allowed} file.")
        return files
    if not source.exists():
        others = f", a folder of them, or one of {', '.join(names)}" if names else " or a folder of them"
        raise ApiqError(f"there is no corpus {source}; give a {allowed} file{others}.")
    if source.suffix not in suffixes:
        raise ApiqError(f"the corpus {source} is of no known kind; give a {allowed} file or a folder of them.")
    return [source]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _named(name: str, asked: str | None, default: str) -> tuple[Iterable[str], str]:
    if name == "demo":
        from apiq.calibration import demo_corpus

        split = asked or default
        return demo_corpus.documents(
            split
        ), f"documentation in the standard library of Python {demo_corpus.VERSION}, {split}"
    from apiq.calibration import hub

    return hub.rows(name, asked, default)


def _files(source: Path, column: str) -> tuple[Iterable[str], str]:
    files = files_of(source, SUFFIXES, NAMES)
    return (row for path in files for row in _rows(path, column)), ", ".join(path.as_posix() for path in files)


def _rows(path: Path, column: str) -> Iterator[str]:
    if path.suffix == ".txt":
        return iter([_decoded(path)])
    return (row for (row,) in rows_of(path, (column,)))


def _decoded(path: Path) -> str:
    """The text of a UTF-8 file, line ends as they are, without a byte order mark."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ApiqError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the file first."
        ) from None


def _jsonl_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ApiqError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}.") from None
        except (ValueError, RecursionError):
            raise ApiqError(
                f"{path}, line {number} cannot be read: it holds a number of too many digits, or is nested too deep."
            ) from None
        if not isinstance(row, dict):
            raise ApiqError(
                f'{path}, line {number} is no JSON object; each line should be as in {{"{columns[0]}": ...}}.'
            )
        yield tuple(_text(row.get(column), column, f"{path}, line {number}", row) for column in columns)


def _text(value: Any, column: str, place: str, keys: Iterable[str]) -> str:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ApiqError(f"{place}: {column!r} holds half of a surrogate pair, which is no character.") from None
        return value
    if value is None and column not in keys:
        raise ApiqError(f"{place} has no {column!r}; it has {', '.join(keys) or 'nothing'}.")
    raise ApiqError(f"{place}: {column!r} is {value!r:.40}; it should be text.")


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        for column in columns:
            if names.count(column) != 1:
                many = "several columns" if column in names else "no column"
                raise ApiqError(f"{path} has {many} {column!r}; it has {', '.join(names)}.")
        table = file.read(columns=list(columns))
    except (pyarrow.ArrowException, OSError):
        raise ApiqError(f"{path} is damaged: it is not a Parquet file, or part of one is missing.") from None
    return zip(*(_texts(table[column], column, path) for column in columns), strict=True)


def _texts(values: ChunkedArray, column: str, path: Path) -> list[str]:
    from pyarrow import types

    kind = values.type.value_type if types.is_dictionary(values.type) else values.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ApiqError(f"{path}: the column {column!r} holds {values.type}; it should hold text.")
    try:
        texts = values.to_pylist()
    except UnicodeDecodeError:
        raise ApiqError(f"{path}: the column {column!r} holds bytes that are not UTF-8; convert it first.") from None
    if None in texts:
        raise ApiqError(f"{path}, row {texts.index(None) + 1} has no text in {column!r}.")
    return texts
