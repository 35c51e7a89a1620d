"""From a sweep file to its cells, each with the parameters that it runs with, validated before anything runs."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apiq.calibration.corpora import NAMES
from apiq.checks import check, known_config
from apiq.errors import ApiqError
from apiq.files import sha256
from apiq.overrides import assign, leaves, override
from apiq.params import parse
from apiq.profiles import laid
from apiq.sweeps.file import BESIDE, Profile, Sweep, load_sweep
from apiq.work import code_version, fingerprint


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    """Readable and the same for the same parameters, code and number of threads: the name of its DVC experiment."""
    labels: Mapping[str, str]
    """Axis -> the choice made."""
    changes: Mapping[str, Any]
    """What tells this cell from the others, by path in params.yaml."""
    settings: Mapping[str, Any]
    """All that is to be set in params.yaml, with what all cells share."""
    refused: str | None = None
    """Why it cannot be run, as the file says."""


@dataclass(frozen=True)
class Plan:
    """A sweep on one model, ready to run."""

    name: str
    """Of the folder of its results: the file's, with that of the profile or model where it is not params.yaml's."""
    sweep: Sweep
    profile: str | None
    """Name of the profile in params/ that is laid over params.yaml first."""
    cells: tuple[Cell, ...]
    threads: int


@dataclass(frozen=True)
class Local:
    """A model and texts on disk in the place of those of params.yaml."""

    model: str | None = None
    """A folder, or a name on the hub as NAME@REVISION."""
    calibration: str | None = None
    """Corpus to calibrate and finetune on."""
    text: str | None = None
    """Corpus to measure perplexity on, cut as the first one of params.yaml."""

    def changes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What they set; `values` are all parameters so far."""
        changes: dict[str, Any] = {}
        if self.model is not None:
            name, _, revision = (self.model, "", "") if Path(self.model).is_dir() else self.model.partition("@")
            changes |= {"model.source": name, "model.revision": revision or None}
        if self.calibration is not None:
            changes |= {"calibration.corpus": self.calibration, "finetune.text": self.calibration}
        if self.text is not None:
            cut = next(iter(values["evaluate"]["perplexity"].values()), {})
            changes |= {"evaluate.perplexity": {"text": {**cut, "text": self.text}}}
        return changes


def plan(
    path: str | Path,
    profile: str | None = None,
    local: Local | None = None,
    settings: Sequence[str] = (),
    threads: int = 1,
) -> Plan:
    """Read a sweep file and validate every cell of it, in the root of the repository.

    What is said later wins: params.yaml, the profile in params/, the base of the file, that of its profile, `local`,
    `settings` (section.key=value), the cell's own changes.

    Raises:
        ApiqError: the file is wrong, or a cell that it does not call refused cannot be run.
    """
    local, path = local or Local(), Path(path)
    sweep = load_sweep(path)
    chosen = _profile(sweep, profile, path)
    given = leaves(override({}, settings))
    values = laid(chosen.params)
    shared = {**sweep.base, **chosen.base}
    with _naming(f"{path}, base"):
        assign(values, shared)
    shared |= {**local.changes(values), **given}
    assign(values, shared)
    name = slug(path.stem, *([profile] if profile else []), *([Path(local.model).name] if local.model else []))
    identity = {"code": _code(), "threads": threads, "keep": sweep.keep}
    cells = []
    for labels, own in _combinations(sweep, chosen):
        if taken := sorted(given.keys() & own.keys()):
            raise ApiqError(f"{path} varies {taken[0]}, so it cannot be set for all cells; leave out -S {taken[0]}.")
        reason, all_of_it = _refusal(sweep, labels), {**shared, **own}
        decided: dict[str, Any] = all_of_it
        if reason is None:
            with _naming(f"{path}, cell {', '.join(labels.values())}"):
                all_of_it, decided = _resolve(laid(chosen.params), all_of_it)
        mark = fingerprint({**identity, "parameters": decided})[:8]
        cells.append(Cell(f"{slug(name, *labels.values())}-{mark}", labels, own, all_of_it, reason))
    return Plan(name, sweep, chosen.params, tuple(cells), threads)


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Say in a refusal which part of which file it is about."""
    try:
        yield
    except ApiqError as error:
        raise ApiqError(f"{place}: {error}") from None


def _profile(sweep: Sweep, name: str | None, path: Path) -> Profile:
    if name is not None and name not in sweep.profiles:
        known = ", ".join(sweep.profiles) or "none"
        raise ApiqError(f"{path} has no profile {name}; it has {known}.")
    return sweep.profiles[name] if name is not None else Profile()


def _combinations(sweep: Sweep, profile: Profile) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Labels and changes of each cell; where two axes change the same key, the later one wins."""
    axes = []
    for axis, choices in sweep.grid.items():
        more = profile.grid.get(axis, {})
        axes.append([(label, choices.get(label, {}) | more.get(label, {})) for label in {**choices, **more}])
    for choice in itertools.product(*axes) if axes else ():
        labels = dict(zip(sweep.axes, (label for label, _ in choice), strict=True))
        yield labels, {key: value for _, changes in choice for key, value in changes.items()}
    for label, changes in sweep.cells.items():
        yield dict.fromkeys(sweep.axes, BESIDE) | {sweep.axes[0]: label}, dict(changes)


def _resolve(values: dict[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The changes with files named by absolute paths, as a cell works in another folder, and all parameters then.

    Raises:
        ApiqError: they cannot be run.
    """
    assign(values, changes)
    rooted = _rooted(values)
    assign(values, rooted)
    params = parse(values)
    check(params, known_config(params.model))
    return {**changes, **rooted}, params.model_dump(mode="json")


def _rooted(values: Mapping[str, Any]) -> dict[str, Any]:
    """The absolute paths of models and texts that are files or folders here."""
    places = ["model.source", "calibration.corpus", "finetune.text", "finetune.pairs"]
    texts = values.get("evaluate", {}).get("perplexity", {})
    places += [f"evaluate.perplexity.{name}.text" for name in texts]
    given = leaves({key: values.get(key, {}) for key in ("model", "calibration", "finetune", "evaluate")})
    found = {place: given[place] for place in places if isinstance(given.get(place), str) and given[place]}
    rooted: dict[str, Any] = {place: _absolute(value) for place, value in found.items() if _absolute(value) != value}
    tasks = Path(given.get("evaluate.task_folder") or ".")
    if not tasks.resolve().is_relative_to(Path.cwd()):  # what is in the repository is in its clones too
        rooted["evaluate.task_folder"] = str(tasks.resolve())
    mixture = given.get("calibration.mixture")
    if isinstance(mixture, list) and mixture and all(isinstance(source, str) for source in mixture):
        rooted["calibration.mixture"] = [_absolute(source) for source in mixture]
    return rooted


def _absolute(source: str) -> str:
    """A file or folder that is here by its whole path; a name as it is."""
    known = source.partition(":")[0] in NAMES
    return str(Path(source).resolve()) if not known and Path(source).exists() else source


def _refusal(sweep: Sweep, labels: Mapping[str, str]) -> str | None:
    """The reason in the file for which a cell with these labels is not run."""
    for reason, where in sweep.refused.items():
        if all(labels[axis] in known for axis, known in where.items()):
            return reason
    return None


def _code() -> dict[str, Any]:
    """What decides the result of a cell besides its parameters."""
    scripts = [Path("dvc.yaml"), *sorted(Path("stages").glob("*.py"))]
    return {"apiq": code_version(), **{str(path): sha256(path) for path in scripts if path.is_file()}}


def slug(*words: str) -> str:
    """A name that git, DVC and file systems take."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
