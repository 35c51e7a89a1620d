"""Profiles: partial parameter files that are laid over params.yaml as a whole or not at all."""

from __future__ import annotations

import difflib
import io
import typing
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from apiq.checks import check, known_config
from apiq.errors import ApiqError
from apiq.files import write_text
from apiq.overrides import read_yaml
from apiq.params import Params, parse


def known_profiles(params_path: str | Path = "params.yaml") -> dict[str, str]:
    """The profiles in the folder `params/` beside params.yaml: name and the first line of its comment."""
    folder = Path(params_path).parent / "params"
    return {path.stem: _first_comment(path) for path in sorted(folder.glob("*.yaml"))}


def lay(profile: str | Path, params_path: str | Path = "params.yaml") -> Params:
    """Lay a profile over params.yaml, whose comments stay; return the parameters as they stand then.

    `profile` is a name in `params/` beside params.yaml, or the path of a YAML file. Sections are
    merged key by key; a table of names (evaluate.perplexity) is taken from the profile as a whole.

    Raises:
        ApiqError: there is no such profile, or the outcome cannot be run; params.yaml is as it was.
    """
    path = _find(str(profile), Path(params_path))
    read_yaml(params_path), read_yaml(path)  # their refusals name the file
    yaml = _round_trip()
    values = yaml.load(Path(params_path).read_text(encoding="utf-8"))
    _merge(values, yaml.load(path.read_text(encoding="utf-8")), Params)
    text = io.StringIO()
    yaml.dump(values, text)
    params = parse(YAML(typ="safe").load(text.getvalue()))
    check(params, known_config(params.model))
    write_text(params_path, text.getvalue())
    return params


def _find(profile: str, params_path: Path) -> Path:
    known = known_profiles(params_path)
    if profile in known:
        return params_path.parent / "params" / f"{profile}.yaml"
    if Path(profile).suffix in (".yaml", ".yml"):
        return Path(profile)
    near = difflib.get_close_matches(profile, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}."
    raise ApiqError(f"there is no profile {profile} in {params_path.parent / 'params'}; {hint}")


def _merge(base: MutableMapping[str, Any], overlay: MutableMapping[str, Any], section: type[BaseModel]) -> None:
    for key, value in overlay.items():
        below = _section_in(section, key)
        if below is not None and isinstance(value, MutableMapping):
            if not isinstance(base.get(key), MutableMapping):
                base[key] = CommentedMap()
            _merge(base[key], value, below)
        else:
            base[key] = value


def _section_in(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that `key` opens in `section`; None for a value, a table of names or an unknown key."""
    field = section.model_fields.get(key)
    annotation = field.annotation if field else None
    opens = isinstance(annotation, type) and typing.get_origin(annotation) is None and issubclass(annotation, BaseModel)
    return annotation if opens else None


def _round_trip() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.removeprefix("#").strip() if line.startswith("#") else ""
