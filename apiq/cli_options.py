"""Options of the command line, documented by the fields of params.yaml that they set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from apiq.errors import ApiqError
from apiq.overrides import override
from apiq.params import Params, Section, parse

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout at the end.")]
Out = Annotated[
    Path,
    typer.Option(
        help="Folder to write. It appears whole or not at all, in the place of an older one; what apiq did not write "
        "is never replaced."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "-S",
        "--set",
        metavar="KEY=VALUE",
        help="Set any parameter of params.yaml that this command reads, as in -S quantize.decay_theta=0.",
    ),
]


def field(section: type[Section], name: str, *flags: str, default: Any = ...) -> Any:
    """A command line option for a field of params.yaml, documented by it; without a default it must be given."""
    known = section.model_fields[name]
    shown = known.default if default is ... else default
    if shown == "\n":
        shown = "a newline"
    text = " ".join((known.description or "").split())
    if shown is not None:
        text += f" [dim]\\[default: {shown}][/dim]"
    return typer.Option(*(flags or (f"--{name.replace('_', '-')}",)), help=text, show_default=False)


def parameters(given: Mapping[str, Any], settings: list[str] | None) -> Params:
    """The parameters of a command: what its options say, then what -S says, over the defaults.

    The command reads the sections of `given` and no others.

    Raises:
        ApiqError: they cannot be run, or a setting is of a section that the command does not read.
    """
    for setting in settings or ():
        section = setting.strip().partition(".")[0]
        if section in Params.model_fields and section not in given:
            raise ApiqError(f"-S {setting} sets what this command does not read; it reads {' and '.join(given)}.")
    return parse(override(_given(given), settings or []))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the options that were not given, and with escapes in `join` read."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            kept[key] = _given(value)
        elif value is not None:
            kept[key] = unescape(value) if key == "join" else value
    return kept


def unescape(text: str) -> str:
    """`text` with its backslash-n and backslash-t read as newline and tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def calibration_windows(folder: Path, params: Params) -> Any:
    """Windows (n, length) of the calibration text, cut with the tokenizer of the model in `folder`."""
    from apiq.calibration.mixture import draw_windows
    from apiq.checkpoint.loading import read_tokenizer

    return draw_windows(params.calibration, read_tokenizer(folder))[0]
