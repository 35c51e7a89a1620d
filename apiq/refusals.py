"""What pydantic found wrong, told in one sentence that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError


def require(holds: bool, key: str, value: Any, allowed: str) -> None:
    """Refuse a combination of fields inside a pydantic validator.

    Raises:
        ValueError: `holds` is false; `sentence` knows how to read it.
    """
    if not holds:
        raise ValueError(f"{key}|{value!r}|{allowed}")


def sentence(refusal: ValidationError, root: type[BaseModel]) -> str:
    """The first error of `refusal`, as a sentence for whoever wrote the file."""
    error = refusal.errors(include_url=False)[0]
    location = tuple(part for part in error["loc"] if part != "[key]")
    path = ".".join(map(str, location)) or "the parameters"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return _unknown(location, root)
    if error["type"] == "missing":
        return f"{path} is missing."
    if error["type"] == "value_error" and message.count("|") >= 2:
        key, value, allowed = message.split("|", 2)
        return f"{path}.{key} is {value}; it must be {allowed}."
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{path} is {error['input']!r}; it should be a section of key: value lines."
    allowed = message.removeprefix("Input ").removeprefix("String ").replace("should", "it should", 1)
    return f"{path} is {error['input']!r}; {allowed}."


def _unknown(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    known = list(_section(location[:-1], root).model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here are {', '.join(known)}."
    return f"{'.'.join(map(str, location))} is not a parameter; {hint}"


def _section(path: tuple[int | str, ...], section: type[BaseModel]) -> type[BaseModel]:
    """The model that `path` leads to; a mapping of models is entered by any key."""
    entering_mapping = None
    for part in path:
        if entering_mapping is not None:
            section, entering_mapping = entering_mapping, None
            continue
        annotation = section.model_fields[str(part)].annotation
        if typing.get_origin(annotation) is dict:
            entering_mapping = typing.get_args(annotation)[1]
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return section
