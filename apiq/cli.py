"""The command `apiq`.

Every command refuses or fails with one sentence on stderr and status 1, wrong usage is status 2, and
`--json` prints one JSON object on stdout at the end; everything else goes to stderr.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from apiq import cli_exports, cli_planning, cli_refine, cli_sweep
from apiq.cli_options import Json, Out, Set, calibration_windows, field, parameters, unescape
from apiq.cli_output import show, working
from apiq.errors import ApiqError
from apiq.mishaps import mishap
from apiq.params import CalibrationParams, FinetuneParams, QuantizeParams

app = typer.Typer(
    help="Quantize a language model to a few bits with adapters that undo the damage (ApiQ, arXiv 2402.05147), "
    "finetune the adapters, and measure what is left.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="A local folder in Hugging Face format, or a hub repository: NAME or NAME@REVISION.")
    ],
    out: Out,
    method: Annotated[str | None, field(QuantizeParams, "method")] = None,
    recipe: Annotated[str | None, field(QuantizeParams, "recipe")] = None,
    bits: Annotated[float | None, field(QuantizeParams, "bits")] = None,
    group_size: Annotated[int | None, field(QuantizeParams, "group_size")] = None,
    target_bits: Annotated[float | None, field(QuantizeParams, "target_bits", default="none")] = None,
    symmetric: Annotated[bool | None, field(QuantizeParams, "symmetric", "--symmetric/--asymmetric")] = None,
    rank: Annotated[int | None, field(QuantizeParams, "rank")] = None,
    adapter: Annotated[str | None, field(QuantizeParams, "adapter")] = None,
    adapter_targets: Annotated[str | None, field(QuantizeParams, "adapter_targets", default="all")] = None,
    epochs: Annotated[int | None, field(QuantizeParams, "epochs", default="that of the recipe")] = None,
    batch_size: Annotated[int | None, field(QuantizeParams, "batch_size", default="that of the recipe")] = None,
    calibration: Annotated[str | None, field(CalibrationParams, "corpus", "--calibration")] = None,
    windows: Annotated[int | None, field(CalibrationParams, "windows")] = None,
    length: Annotated[int | None, field(CalibrationParams, "length")] = None,
    column: Annotated[str | None, field(CalibrationParams, "column")] = None,
    join: Annotated[str | None, field(CalibrationParams, "join")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the windows and of the adapters' start. [dim]\\[default: 0][/dim]", show_default=False
        ),
    ] = None,
    device: Annotated[str | None, field(QuantizeParams, "device")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and fit its adapters on calibration text.

    [bold]Example:[/bold] apiq quantize ./my-model --out ./my-model-2bit --bits 2 --group-size 64 --rank 64
    --calibration train.jsonl --windows 128 --length 2048

    A stopped run is taken up where it was by the same command: finished blocks wait in
    $APIQ_WORK, or in .apiq_work/ here.
    """
    from apiq.models.source import locate

    given = {
        "quantize": {"method": method, "recipe": recipe, "bits": bits, "group_size": group_size,
                     "target_bits": target_bits, "symmetric": symmetric, "rank": rank, "adapter": adapter,
                     "adapter_targets": adapter_targets,
                     "epochs": epochs, "batch_size": batch_size, "device": device, "seed": seed},
        "calibration": {"corpus": calibration, "windows": windows, "length": length, "column": column, "join": join,
                        "seed": seed},
    }  # fmt: skip
    params = parameters(given, settings)
    with working("quantize") as progress:
        folder = locate(model)
        needed = params.quantize.calibrated or calibration is not None
        tokens = calibration_windows(folder, params) if needed else None
        import apiq.quantization

        result = apiq.quantization.quantize(folder, tokens, params.quantize, out, progress)
    show(result, as_json)


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A folder of any kind (full precision, quantized, finetuned) or a hub name.")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="Corpus for perplexity: a .txt, .jsonl or .parquet file, a folder of them, or a name as wikitext2."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="First so many non-overlapping windows; 0 for all.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    join: Annotated[str, typer.Option(help="What stands between rows; \\n is a newline, \\n\\n a blank line.")] = "\\n",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder with lm-eval task descriptions of your own.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter/--no-adapter", help="Use the adapters in the folder.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    settings: Set = None,
    as_json: Json = False,
) -> None:
    r"""Measure perplexity (--text) and lm-eval tasks (--tasks) of a model.

    [bold]Example:[/bold] apiq evaluate ./my-model-2bit --text wikitext2 --join '\n\n' --length 2048 --json
    """
    if text is None and not tasks:
        raise typer.BadParameter("give --text, --tasks or both.")
    corpus = {"text": text, "windows": windows, "length": length, "column": column, "join": unescape(join)}
    given = {
        "evaluate": {"perplexity": {} if text is None else {"text": corpus}, 
                     "tasks": [name for name in map(str.strip, tasks.split(",")) if name],
                     "task_folder": None if task_folder is None else str(task_folder), "device": device},
    }  # fmt: skip
    params = parameters(given, settings).evaluate
    with working("evaluate") as progress:
        from apiq.checkpoint.loading import load
        from apiq.evaluation.run import evaluate as measure

        loaded = load(model, adapters=adapter, dtype=params.dtype, device=params.device)
        result = measure(loaded.model, loaded.tokenizer, params, progress)
    if text is not None:
        result = {**result, "perplexity": result["perplexity"]["text"]}
    show({"kind": loaded.kind, "model": model, **result}, as_json)


@app.command()
def finetune(
    folder: Annotated[Path, typer.Argument(help="A quantized folder with adapters.")],
    out: Out,
    text: Annotated[str | None, field(FinetuneParams, "text", default="none")] = None,
    pairs: Annotated[str | None, field(FinetuneParams, "pairs")] = None,
    length: Annotated[int | None, field(FinetuneParams, "length")] = None,
    epochs: Annotated[float | None, field(FinetuneParams, "epochs")] = None,
    batch_size: Annotated[int | None, field(FinetuneParams, "batch_size")] = None,
    learning_rate: Annotated[float | None, field(FinetuneParams, "learning_rate")] = None,
    seed: Annotated[int | None, field(FinetuneParams, "seed")] = None,
    device: Annotated[str | None, field(FinetuneParams, "device")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train the adapters of a quantized model on text (--text) or on prompts and answers (--pairs).

    [bold]Example:[/bold] apiq finetune ./my-model-2bit --pairs train.jsonl --out ./my-model-tuned --length 512

    The quantized weights stay frozen and packed. A stopped run is taken up at its last checkpoint
    by the same command.
    """
    if (text is None) == (pairs is None):
        raise typer.BadParameter("give either --text or --pairs.")
    given = {
        "finetune": {"task": "lm" if pairs is None else "instruction", "text": text, "pairs": pairs, "length": length,
                     "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
                     "device": device},
    }  # fmt: skip
    params = parameters(given, settings)
    with working("finetune") as progress:
        from apiq.finetuning.run import finetune as train

        result = train(folder, params.finetune, out, progress)
    show(result, as_json)


@app.command()
def report(
    data: Annotated[Path, typer.Option(help="Folder with the outputs of the pipeline.")] = Path("data"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html, figures and tables. [dim]\\[default: DATA/report][/dim]", show_default=False
        ),
    ] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Write the report page of a pipeline run: one HTML file that works offline, figures, tables."""
    params = parameters({"report": {}}, settings).report
    with working("report"):
        from apiq.reporting.page import report as write

        page = write(data, out or data / "report", title=params.title, histogram_block=params.histogram_block)
    show({"report": str(page)}, as_json)


@app.command()
def profile(
    name: Annotated[
        str | None, typer.Argument(help="Name of a profile in params/, or a YAML file; none lists them.")
    ] = None,
    params: Annotated[Path, typer.Option(help="The file to lay the profile over.")] = Path("params.yaml"),
    as_json: Json = False,
) -> None:
    """Lay a profile over params.yaml, keeping its comments; the result is validated before it is written.

    [bold]Example:[/bold] apiq profile llama2-7b-2bit
    """
    with working("profile"):
        from apiq import profiles

        known = profiles.known_profiles(params) if name is None else {}
        laid = profiles.lay(name, params).model_dump(mode="json") if name is not None else {}
    if name is not None:
        show({"profile": name, "parameters": laid}, as_json)
    elif as_json:
        show({"profiles": known}, as_json)
    else:
        for each, told in known.items():
            print(f"{each:{max(map(len, known))}}  {told}")


app.command()(cli_refine.refine)
app.command()(cli_exports.export)
app.command()(cli_exports.merge)
app.command()(cli_exports.push)
app.command()(cli_planning.plan)
app.command()(cli_planning.doctor)
app.command()(cli_sweep.sweep)


def main() -> None:
    """Run the command line."""
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        app()
    except ApiqError as error:
        print(f"apiq: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if (told := mishap(error)) is None:
            raise
        print(f"apiq: {told}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
