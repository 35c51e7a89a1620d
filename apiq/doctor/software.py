"""Python and the installed packages against what the project declares."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from apiq.doctor.finding import Finding

DISTRIBUTION = "apiq"


def check() -> Iterator[Finding]:
    """Python, and the packages of the library and of its extras."""
    try:
        known = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages", "warning", "apiq is imported from a folder, not installed, so no bounds are known",
            "pip install -e . in that folder",
        )  # fmt: skip
        return
    yield python(platform.python_version(), known["Requires-Python"] or "")
    yield from packages(metadata.requires(DISTRIBUTION) or [], _version)


def python(version: str, bounds: str) -> Finding:
    """The running Python against `bounds`, as in `>=3.11`."""
    if SpecifierSet(bounds).contains(version, prereleases=True):
        return Finding("python", "ok", version)
    return Finding(
        "python", "problem", f"{version}, which is not {bounds}", f"make the environment with Python {bounds}"
    )


def packages(requirements: Iterable[str], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """One finding for all packages within their bounds, and one for each that is not.

    Args:
        requirements: as in the metadata of a distribution, with markers for the extras.
        installed: the version of a package, None where it is not there.
    """
    good, bad, missing = 0, [], set()
    for requirement in map(Requirement, requirements):
        extra = _extra(requirement)
        elsewhere = requirement.marker is not None and not requirement.marker.evaluate({"extra": extra or ""})
        if elsewhere or requirement.name == DISTRIBUTION:
            continue
        version = installed(requirement.name)
        if version is None and extra is not None:
            missing.add(extra)
        elif version is None:
            bad.append(_finding(requirement, "is not installed", "problem"))
        elif not requirement.specifier.contains(version, prereleases=True):
            bad.append(_finding(requirement, f"is {version}", "problem" if extra is None else "warning"))
        else:
            good += 1
    yield Finding("packages", "ok", f"{good} within their bounds")
    yield from bad
    if missing:
        names = ", ".join(sorted(missing))
        yield Finding(
            "extras", "ok", f"parts of {names} are not installed", f"pip install 'apiq[{names}]' to have them"
        )


def _finding(requirement: Requirement, found: str, status: str) -> Finding:
    asked = f"{requirement.name}{requirement.specifier}"
    return Finding(
        f"package {requirement.name}", "problem" if status == "problem" else "warning",
        f"{found}; the bounds are {requirement.specifier}", f"pip install '{asked}'",
    )  # fmt: skip


def _extra(requirement: Requirement) -> str | None:
    """The extra that a requirement belongs to."""
    text = str(requirement.marker).replace('"', "'")
    return text.rpartition("extra == '")[2].partition("'")[0] if "extra ==" in text else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
