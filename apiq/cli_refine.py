"""The command `apiq refine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apiq.cli_options import Json, Out, Set, calibration_windows, field, parameters
from apiq.cli_output import show, working
from apiq.params import CalibrationParams
from apiq.refine_params import RefineParams


def refine(
    folder: Annotated[Path, typer.Argument(help="A quantized folder.")],
    out: Out,
    text: Annotated[str, field(CalibrationParams, "corpus", "--text", default=None)],
    model: Annotated[
        str | None,
        typer.Option(
            help="The full-precision model that FOLDER was made from. [dim]\\[default: where it was then][/dim]",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[str | None, field(RefineParams, "recipe")] = None,
    windows: Annotated[int | None, field(CalibrationParams, "windows")] = None,
    length: Annotated[int | None, field(CalibrationParams, "length")] = None,
    column: Annotated[str | None, field(CalibrationParams, "column")] = None,
    join: Annotated[str | None, field(CalibrationParams, "join")] = None,
    epochs: Annotated[int | None, field(RefineParams, "epochs", default="that of the recipe")] = None,
    generated: Annotated[int | None, field(RefineParams, "generated", default="that of the recipe")] = None,
    batch_size: Annotated[int | None, field(RefineParams, "batch_size")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of all windows and of their order. [dim]\\[default: 0][/dim]", show_default=False),
    ] = None,
    device: Annotated[str | None, field(RefineParams, "device")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train adapters and scales of a quantized model, end to end, against its full-precision model.

    [bold]Example:[/bold] apiq refine ./my-model-2bit --text train.jsonl --windows 128 --length 2048
    --out ./my-model-2bit-refined

    Codes and zero points stay as they are, so the bits do too. The windows may be those that the model was
    quantized on: the same text, windows, length and seed. A stopped run is taken up after its last pass by
    the same command.
    """
    given = {
        "refine": {"recipe": recipe, "epochs": epochs, "generated": generated, "batch_size": batch_size, "seed": seed,
                   "device": device},
        "calibration": {"corpus": text, "windows": windows, "length": length, "column": column, "join": join,
                        "seed": seed},
    }  # fmt: skip
    params = parameters(given, settings)
    with working("refine") as progress:
        from apiq.checkpoint import manifest
        from apiq.checkpoint.original import find
        from apiq.refinement.admission import refuse_folder
        from apiq.refinement.run import refine as train

        facts = manifest.verify(folder)
        refuse_folder(folder, facts, params.refine)
        original = find(folder, facts) if model is None else model
        result = train(folder, original, calibration_windows(folder, params), params.refine, out, progress)
    show(result, as_json)
