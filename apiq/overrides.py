"""Nested parameters as files hold them: read, lay one over another, override single keys."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from apiq.errors import ApiqError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file (as DVC reads it: 3e-4 is a number).

    Raises:
        ApiqError: the file is missing, is not YAML or holds no mapping.
    """
    try:
        values = YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ApiqError(f"there is no file {path}.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ApiqError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, Mapping):
        raise ApiqError(f"{path} holds no sections; write one of them as in `quantize:` with indented keys.")
    return dict(values)


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Lay `section.key=value` assignments (values in YAML) over a nested mapping.

    Raises:
        ApiqError: an assignment is not of that form.
    """
    result = lay_over(values, {})
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or len(keys) < 2 or not all(keys):
            raise ApiqError(f"the override {assignment!r} is not of the form section.key=value, as in quantize.bits=3.")
        try:
            overlay: Any = YAML(typ="safe").load(io.StringIO(text))
        except YAMLError:
            raise ApiqError(f"the value in the override {assignment!r} is not YAML.") from None
        for key in reversed(keys):
            overlay = {key: overlay}
        result = lay_over(result, overlay)
    return result


def assign(values: MutableMapping[str, Any], assignments: Mapping[str, Any]) -> None:
    """Set single keys of nested `values`, as in {"quantize.bits": 3}; sections that are not there are made.

    Raises:
        ApiqError: a key is not of the form section.key.
    """
    for path, value in assignments.items():
        *sections, key = path.split(".")
        if not sections or not all(sections) or not key:
            raise ApiqError(f"the parameter {path!r} is not of the form section.key, as in quantize.bits.")
        place = values
        for section in sections:
            if not isinstance(place.get(section), MutableMapping):
                place[section] = type(values)()
            place = place[section]
        place[key] = copy.deepcopy(value)  # a later assignment may be below it


def lay_over(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which the leaves of `overlay` replace or join those of `base`."""
    result = {key: lay_over(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in overlay.items():
        below = result.get(key)
        result[key] = (
            lay_over(below if isinstance(below, Mapping) else {}, value) if isinstance(value, Mapping) else value
        )
    return result


def leaves(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves of nested values by their paths, as in {"quantize.bits": 3}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
