"""About 2 MB of English that every Python carries: the language reference of `help()` and the library's docstrings.

Both are read from the source files of the running Python with `ast`; nothing is imported. Packages that
distributions leave out or ship apart (tests, IDLE, Tk, distutils) are not read, so one version of Python gives one
corpus. A paragraph that occurs twice is kept once, so no paragraph is in two splits.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from apiq.errors import ApiqError

VERSION = platform.python_version()
SPLITS = ("train", "validation", "test")
SHORTEST = 40
"""Characters below which a paragraph may occur again, and a document is left out."""
LONGEST = 2_000
"""Characters of a document; longer ones are split between paragraphs, so that splits are of even size."""

_OPTIONAL = frozenset({
    "test", "tests", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "ensurepip", "pydoc_data",
    "site-packages", "dist-packages",
})  # fmt: skip


def documents(split: str) -> tuple[str, ...]:
    """The documents of a split, each ending in a newline: 90 % train, 5 % validation, 5 % test, by a hash of the text.

    Raises:
        ApiqError: there is no such split, or the source files of the standard library are not installed.
    """
    if split not in SPLITS:
        raise ApiqError(f"the corpus demo has no split {split!r}; it has {', '.join(SPLITS)}.")
    return _splits()[split]


@functools.cache
def _splits() -> dict[str, tuple[str, ...]]:
    library = Path(sysconfig.get_path("stdlib"))
    texts = dict.fromkeys(_parts(_without_repetition([*_topics(library), *_docstrings(library)])))
    parts: dict[str, list[tuple[bytes, str]]] = {split: [] for split in SPLITS}
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        share = digest[0] / 256
        parts["train" if share >= 0.1 else "validation" if share >= 0.05 else "test"].append((digest, text))
    return {split: tuple(text for _, text in sorted(part)) for split, part in parts.items()}


def _topics(library: Path) -> Iterator[str]:
    """The language reference as `help("if")` shows it: strings in one dictionary literal."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise ApiqError(f"the demo corpus needs the source files of Python's standard library, and {path} is missing.")
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign):
            yield from (text for _, text in sorted(ast.literal_eval(statement.value).items()))


def _docstrings(library: Path) -> Iterator[str]:
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        source = path.read_bytes()
        if _OPTIONAL.isdisjoint(path.relative_to(library).parts) and b'"""' in source:
            try:
                with warnings.catch_warnings(action="ignore"):
                    module = ast.parse(source)
            except (SyntaxError, ValueError):
                continue  # some files are wrong on purpose
            yield from _docstrings_in([module])


def _docstrings_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
            yield from _docstrings_in(node.body)
        elif isinstance(node, ast.If | ast.Try):
            yield from _docstrings_in([*node.body, *node.orelse, *getattr(node, "handlers", [])])
        elif isinstance(node, ast.ExceptHandler):
            yield from _docstrings_in(node.body)


def _without_repetition(texts: Iterable[str]) -> Iterator[list[str]]:
    """The paragraphs of each text that no text before had."""
    seen: set[str] = set()
    for text in texts:
        kept = []
        for paragraph in inspect.cleandoc(text).split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < SHORTEST or key not in seen:
                seen.add(key)
                kept.append(paragraph.rstrip())
        yield kept


def _parts(texts: Iterable[list[str]]) -> Iterator[str]:
    """Documents of whole paragraphs, none much longer than `LONGEST`, none shorter than `SHORTEST`."""
    for paragraphs in texts:
        part = ""
        for paragraph in [*paragraphs, None]:
            if paragraph is None or (part and len(part) + len(paragraph) > LONGEST):
                if len(part.strip()) >= SHORTEST:
                    yield part.strip("\n") + "\n"
                part = ""
            part += f"{paragraph}\n\n"
