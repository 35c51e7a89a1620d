"""What pydantic found wrong, told in one sentence that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "one character or more",
    "list_type": "a list, as in [a, b]",
    "too_short": "a list of one entry or more",
    "dict_type": "a section of name: value lines",
}
_BOUNDS = {"greater_than_equal", "greater_than", "less_than_equal", "less_than"}
_PATTERNS = {
    r"^(auto|cpu|cuda(:\d+)?|mps)$": "auto, cpu, cuda, cuda:N or mps",
    r"^[A-Za-z0-9_-]+$": "a name of letters, digits, - and _",
}


def require(holds: bool, key: str, value: Any, allowed: str) -> None:
    """Refuse a combination of fields inside a pydantic validator, or the field of which it is the validator (no `key`).

    Raises:
        ValueError: `holds` is false; `sentence` knows how to read it.
    """
    if not holds:
        raise ValueError(f"{key}|{_shown(value)}|{allowed}")


def sentence(refusal: ValidationError, root: type[BaseModel]) -> str:
    """The first error of `refusal`, as a sentence for whoever wrote the file."""
    error = refusal.errors(include_url=False)[0]
    location = tuple(part for part in error["loc"] if part != "[key]")
    path = ".".join(map(str, location)) or "the file"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return _unknown(location, root)
    if error["type"] == "missing":
        return f"{path} is missing."
    if error["type"] == "value_error" and message.count("|") >= 2:
        key, value, allowed = message.split("|", 2)
        return f"{'.'.join(filter(None, [*map(str, location), key]))} is {value}; it should be {allowed}."
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{path} is {_shown(error['input'])}; it should be a section of key: value lines."
    if error["type"] == "invalid_key":
        return f"{path} is not a parameter; keys are text."
    if error["loc"] and error["loc"][-1] == "[key]":
        return f"{path} is not a name that can be used; it should be {_allowed(error, None)}."
    return f"{path} is {_shown(error['input'])}; it should be {_allowed(error, _field(location, root))}."


def _allowed(error: Any, field: FieldInfo | None) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"text that matches {context['pattern']}")
    if kind == "literal_error":
        return context["expected"].translate({ord("'"): None}).replace("False, True", "false, true")
    if kind in _BOUNDS and field is not None:
        return _range(field)
    return error["msg"].removeprefix("Input should be ")


def _range(field: FieldInfo) -> str:
    """All bounds of a number: `at least 1 and at most 8`."""
    names = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = ((words, getattr(bound, name, None)) for bound in field.metadata for name, words in names.items())
    return " and ".join(f"{words} {value}" for words, value in bounds if value is not None)


def _shown(value: Any) -> str:
    return "empty" if value is None else repr(value)


def _unknown(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    known = list(_section(location[:-1], root).model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here are {', '.join(known)}."
    return f"{'.'.join(map(str, location))} is not a parameter; {hint}"


def _field(path: tuple[int | str, ...], root: type[BaseModel]) -> FieldInfo | None:
    return _section(path[:-1], root).model_fields.get(str(path[-1])) if path else None


def _section(path: tuple[int | str, ...], section: type[BaseModel]) -> type[BaseModel]:
    """The model that `path` leads to; mappings, lists and choices of models are entered by any key."""
    for part in path:
        field = section.model_fields.get(str(part))
        section = next(_models(field.annotation), section) if field else section
    return section


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for below in typing.get_args(annotation):
        yield from _models(below)
