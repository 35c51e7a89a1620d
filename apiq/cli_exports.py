"""The commands that hand a model on: `apiq export`, `apiq merge` and `apiq push`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from apiq.cli_options import Json, Out, Set, calibration_windows, field, parameters, unescape
from apiq.cli_output import show, working
from apiq.params import CalibrationParams

Folder = Annotated[Path, typer.Argument(help="A quantized folder, or a finetuned one with its base where it was.")]


class Into(StrEnum):
    """Where `apiq merge` puts adapters."""

    DENSE = "dense"
    ZEROS = "zeros"


class Format(StrEnum):
    """The formats of `apiq.exports.run`, which is not imported to show help."""

    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ_V2 = "gptq-v2"
    GPTQ = "gptq"
    AWQ = "awq"
    GGUF = "gguf"
    DENSE = "dense"
    APIQ = "apiq"


def export(
    folder: Folder,
    format: Annotated[Format, typer.Option(help="What the program that will run it reads.")],
    out: Out,
    dtype: Annotated[
        str, typer.Option(help="Of what is not quantized: float32, float16, bfloat16; auto chooses by the format.")
    ] = "auto",
    adapter_bits: Annotated[
        int | None,
        typer.Option(help="8 or 4: store A and B in so many bits; for format apiq.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write FOLDER in the format of another program, with the same codes, scales and zero points.

    [bold]Example:[/bold] apiq export ./my-model-2bit --format compressed-tensors --out ./my-model-vllm

    compressed-tensors for vLLM, SGLang and transformers: 1 to 8 bits. gptq-v2 for gptqmodel: 2, 3, 4 and 8 bits. gptq
    for engines that read version 1 only: symmetric, 4 and 8 bits. awq: 4 bits. gguf for llama.cpp: where its blocks of
    32 hold the codes. dense for everything else: dequantized. apiq for apiq itself, with trained adapters inside the
    folder, in few bits with --adapter-bits.

    The adapter goes beside, in OUT/adapter, in PEFT's format. What a format cannot hold exactly is refused, with the
    setting that makes it possible.
    """
    with working("export"):
        from apiq.exports.run import export as write

        result = write(folder, out, format.value, dtype, adapter_bits)
    show(result, as_json)


def merge(
    folder: Folder,
    out: Out,
    dtype: Annotated[
        str, typer.Option(help="Of the merged weights: float32, float16, bfloat16; auto is that of the checkpoint.")
    ] = "auto",
    into: Annotated[
        Into,
        typer.Option(help="dense weights; or the zero points of the quantized ones, for adapters that were pooled."),
    ] = Into.DENSE,
    back: Annotated[
        str | None,
        typer.Option(
            "--requantize",
            metavar="METHOD",
            help="Quantize the merged model again, on the same grid: rtn, or gptq, awq, omniquant with --calibration.",
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Corpus for the perplexity before and after; needed with --requantize.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window of --text.")] = 2048,
    windows: Annotated[int, typer.Option(min=0, help="First so many windows of --text; 0 for all.")] = 0,
    column: Annotated[str, typer.Option(help="Column of --text.")] = "text",
    join: Annotated[str, typer.Option(help="What stands between its rows; \\n is a newline.")] = "\\n",
    calibration: Annotated[str | None, field(CalibrationParams, "corpus", "--calibration", default="none")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    r"""Write the model with its adapters inside the weights: dense, or in a few bits.

    [bold]Example:[/bold] apiq merge ./my-model-tuned --out ./my-model-merged --dtype float16

    A dense model computes what it did with the adapter beside. So does the quantized one with
    [bold]--into zeros[/bold], if the adapter was trained with finetune.pooled. Other adapters lie on no grid:
    [bold]apiq merge ./my-model-tuned --out ./my-model-again --requantize rtn --text wikitext2 --join '\n\n'[/bold] says
    what rounding the sum again costs in perplexity. The windows of --calibration are set with
    [bold]-S calibration.windows=64 -S calibration.length=1024[/bold].
    """
    if (settings or calibration is not None) and back is None:
        raise typer.BadParameter("--calibration and -S are for --requantize; give a METHOD, or leave them out.")
    if settings and (calibration is None or not all(each.strip().startswith("calibration.") for each in settings)):
        raise typer.BadParameter("-S sets how the windows of --calibration are drawn: calibration.KEY=VALUE.")
    if into == Into.ZEROS:
        if back is not None or dtype != "auto":
            raise typer.BadParameter("--into zeros keeps the codes; leave out --requantize and --dtype.")
        with working("merge"):
            from apiq.exports.zeros import merge_into_zeros

            result = merge_into_zeros(folder, out)
    elif back is None:
        with working("merge"):
            from apiq.exports.merge import merge as write

            result = write(folder, out, dtype)
    else:
        if text is None:
            raise typer.BadParameter("--requantize needs --text, to say what it costs.")
        if dtype != "auto":
            raise typer.BadParameter("--dtype is for dense weights; leave it out with --requantize.")
        given = {"calibration": {"corpus": calibration, "column": column, "join": join}}
        params = parameters(given, settings)
        with working("merge") as progress:
            from apiq.calibration.corpora import load_corpus
            from apiq.calibration.windows import consecutive_windows, tokenize
            from apiq.checkpoint.loading import read_tokenizer
            from apiq.exports.merge import requantize
            from apiq.exports.source import open_source

            base = open_source(folder).folder
            corpus = load_corpus(text, split="test", column=column, join=unescape(join))
            scored = consecutive_windows(tokenize(corpus.text, read_tokenizer(base)), windows, length)
            tokens = None if calibration is None else calibration_windows(base, params)
            result = requantize(folder, out, scored, back, tokens, progress)
    show(result, as_json)


def push(
    folder: Annotated[Path, typer.Argument(help="A quantized folder, a finetuned one, or an export.")],
    repository: Annotated[str, typer.Argument(help="Where to on the Hugging Face hub: OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Name of the original on the hub, for the model card.")] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            help="What goes on the model card: the output of apiq evaluate MODEL ... --json > metrics.json, or the "
            "metrics.json of the evaluate stage."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload FOLDER to the Hugging Face hub with a model card made from it.

    [bold]Example:[/bold] apiq push ./my-model-2bit me/my-model-2bit --base-model meta-llama/Llama-2-7b-hf

    Log in first with `hf auth login`. A damaged folder is not uploaded.
    """
    with working("push"):
        from apiq.exports.hub import push_to_hub

        url = push_to_hub(folder, repository, private=private, base_model=base_model, metrics=metrics)
    show({"url": url}, as_json)
