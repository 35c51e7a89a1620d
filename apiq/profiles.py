"""Profiles: partial parameter files that are laid over params.yaml as a whole or not at all."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from apiq.checks import check, known_config
from apiq.errors import ApiqError
from apiq.files import write_text
from apiq.overrides import assign, read_yaml
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
    overlay = _load(path)
    return _rewrite(Path(params_path), lambda values: _merge(values, overlay, Params))


def laid(profile: str | Path | None, params_path: str | Path | None = None) -> dict[str, Any]:
    """The values of params.yaml with a profile, if one is named, laid over them as by `lay`; nothing is written.

    Where there is no params.yaml and no other file is named, the profile is laid over nothing: what it leaves open
    has its default.

    Raises:
        ApiqError: there is no such profile or no file `params_path`, or a file is no YAML.
    """
    base = Path(params_path or "params.yaml")
    values = read_yaml(base) if params_path is not None or base.exists() else {}
    if profile is not None:
        _merge(values, read_yaml(_find(str(profile), base)), Params)
    return values


def change(assignments: Mapping[str, Any], params_path: str | Path = "params.yaml") -> Params:
    """Set single keys of params.yaml, as in {"quantize.bits": 3}; its comments stay.

    Raises:
        ApiqError: a key is not of the form section.key, or the outcome cannot be run; params.yaml is as it was.
    """
    return _rewrite(Path(params_path), lambda values: assign(values, assignments))


def _rewrite(params_path: Path, edit: Callable[[CommentedMap], None]) -> Params:
    """Edit params.yaml in memory, validate the outcome as a whole, and only then write it."""
    values = _load(params_path)
    edit(values)
    text = io.StringIO()
    _round_trip().dump(values, text)
    params = parse(YAML(typ="safe").load(text.getvalue()))
    check(params, known_config(params.model))
    write_text(params_path, text.getvalue())
    return params


def _load(path: Path) -> CommentedMap:
    read_yaml(path)  # refuses what is missing or no YAML
    return _round_trip().load(path.read_text(encoding="utf-8"))


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
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _round_trip() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.removeprefix("#").strip() if line.startswith("#") else ""
