"""What stands in each section of the page: sentences, figures and tables, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apiq.errors import ApiqError
from apiq.reporting import figures, histograms, provenance, results, tables
from apiq.reporting.comparisons import pareto_section, sweep_section
from apiq.reporting.error_section import error_section
from apiq.reporting.gather import MANIFESTS, PHASES, Run
from apiq.reporting.parts import Drawing, Listing, Section
from apiq.reporting.units import known
from apiq.reporting.weights import LinearShape, block_shapes


def sections(run: Run, histogram_block: int, parameters: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """The page from top to bottom; `parameters` are shown for phases that recorded none with their results.

    Raises:
        ApiqError: there is no such block, or a file is damaged.
    """
    return [
        _results(run),
        _blocks(run),
        error_section(run),
        _weights(run, histogram_block),
        _bits(run),
        _finetuning(run),
        _cost(run),
        _provenance(run, parameters),
        *map(sweep_section, run.sweeps),
        pareto_section(run),
    ]


def _results(run: Run) -> Section:
    title = "What was lost and brought back"
    if not run.evaluation:
        return Section("results", title, absent=[run.absent["evaluation"]])
    if not results.texts(run.evaluation) and not results.metrics(run.evaluation):
        return Section("results", title, absent=["The evaluation measured neither texts nor tasks."])
    lost = results.losses(run.evaluation)
    names = results.models(run.evaluation)
    caption = "Log perplexity of each model above that of the full-precision model, which stands at zero."
    drawing = Drawing("perplexity", caption, lambda width: figures.perplexities(lost, names, width))
    listing = Listing("results", "Full precision, quantized and finetuned", tables.results_table(run))
    missing = [f"The {name} model was not evaluated." for model, name in results.EXPECTED.items() if model not in names]
    if not results.metrics(run.evaluation):
        missing.append("No tasks were evaluated.")
    return Section("results", title, [], [drawing] if lost else [], [listing], missing)


def _blocks(run: Run) -> Section:
    title = "Error of each block"
    if not run.blocks:
        return Section("blocks", title, absent=[run.absent.get("quantized", "The quantization recorded no blocks.")])
    drawings, absent = [], []
    if any(block.last for block in run.blocks):
        caption = (
            "Mean squared error of the output of each block on the calibration windows, against that of the "
            "full-precision model; it contains the error of the blocks before."
        )
        drawings.append(Drawing("block_losses", caption, lambda width: figures.block_losses(run.blocks, width)))
    else:
        absent.append("No errors of blocks were measured: the method saw no calibration windows.")
    curves = [curve for curve in run.curves if all(loss > 0 for loss in curve.losses)]
    if curves:
        whole = len({curve.group for curve in curves}) == 1
        what = "the output of each block" if whole else "the output of each linear, one line a block,"
        caption = (
            f"Error of {what} by epoch, from the first block (blue) to the last (orange); epoch 0 is before fitting."
        )
        drawings.append(Drawing("loss_curves", caption, lambda width: figures.loss_curves(curves, width)))
    else:
        absent.append(run.absent.get("curves", "There are no curves by epoch: this method fits nothing."))
    if curves and len(curves) < len(run.curves):
        absent.append("Curves that reach an error of zero are left out: the scale is logarithmic.")
    listing = Listing("blocks", "Errors of the blocks", tables.blocks_table(run.blocks), folded=True)
    return Section("blocks", title, [], drawings, [listing], absent)


def _weights(run: Run, block: int) -> Section:
    title = "Weights, codes and adapters"
    if "quantized" in run.absent or run.folders.quantized is None:
        return Section("weights", title, absent=[run.absent["quantized"]])
    model, missing = _full_precision(run)
    place, shapes = block_shapes(run.folders.quantized, model, block)
    sentence = f"All linears of block {place}, as in Figures 5 and A.2 to A.5 of the paper."
    adapted = any(shape.adapters for shape in shapes)
    drawings = [
        Drawing(
            "weights",
            f"Share of the entries in each bin, on a log scale: {_matrices(model is not None, adapted)}.",
            lambda width: histograms.weight_histograms(shapes, width),
        ),
        Drawing("codes", "How often each code is used.", lambda width: histograms.code_histograms(shapes, width)),
    ]
    absent = [missing] if missing else []
    if adapted:
        caption = "The entries of A and B, on a log scale."
        drawings.append(Drawing("adapters", caption, lambda width: histograms.adapter_histograms(shapes, width)))
    else:
        absent.append("There are no histograms of A and B: the checkpoint has no adapters.")
    table = tables.weights_table(shapes, missing)
    listing = Listing("weights", "Relative weight error", table)
    return Section("weights", title, [sentence, *_closer(shapes)], drawings, [listing], absent)


def _matrices(full_precision: bool, adapted: bool) -> str:
    names = ["the full-precision weight W"] * full_precision + ["the quantized weight Q"]
    names += ["what the adapters add to it, A Bᵀ times alpha / r"] * adapted
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _closer(shapes: Sequence[LinearShape]) -> list[str]:
    pairs = [(shape.error_with, shape.error_without) for shape in shapes]
    pairs = [(after, before) for after, before in pairs if after is not None and before is not None]
    nearer = sum(after < before for after, before in pairs)
    return [f"With its adapters, {nearer} of {len(pairs)} linears are nearer to W than without."] if pairs else []


def _full_precision(run: Run) -> tuple[Path | None, str]:
    """The folder with W, or None and the reason."""
    from apiq.models.source import locate

    if run.folders.model is None:
        return None, "The full-precision weights were left out of this report."
    try:
        return locate(run.folders.model), ""
    except ApiqError as error:
        return None, f"The full-precision weights are not at hand: {error}"


def _bits(run: Run) -> Section:
    title = "Effective bits"
    bits = run.quantization.get("bits", {})
    parts = {part: bits[part] for part in tables.PARTS if known(bits.get(part)) and bits[part] > 0}
    if not parts:
        reason = run.absent.get("quantized", "The metrics of the quantization do not count them.")
        return Section("bits", title, absent=[reason])
    sentence = "All that it takes to compute the quantized linears; embeddings, norms and biases are not counted."
    drawing = Drawing(
        "effective_bits", "Bits for each weight.", lambda width: figures.effective_bits(parts, tables.PARTS, width)
    )
    listing = Listing("effective_bits", "What the bits are spent on", tables.bits_table(bits))
    return Section("bits", title, [sentence], [drawing], [listing])


def _finetuning(run: Run) -> Section:
    title = "Finetuning"
    log = run.training
    if log is None:
        return Section("finetuning", title, absent=[run.absent["finetuned"]])
    if not log.training and not log.held_out:
        return Section("finetuning", title, absent=["The log of the finetuning holds no losses."])
    caption = "Loss of the adapters in training, on the packed, frozen model: on each batch, and on text set aside."
    drawing = Drawing("finetuning", caption, lambda width: figures.finetuning(log, width))
    listing = Listing("finetuning", "Held-out loss", tables.training_table(log), folded=True)
    absent = [] if log.held_out else ["There is no held-out loss in the log."]
    return Section("finetuning", title, [], [drawing], [listing] if log.held_out else [], absent)


def _cost(run: Run) -> Section:
    title = "Time and memory"
    seconds = {phase: cost["seconds"] for phase, cost in run.timing.items() if known(cost.get("seconds"))}
    peaks = {phase: cost["peak_memory_mb"] for phase, cost in run.timing.items() if known(cost.get("peak_memory_mb"))}
    if not seconds and not peaks:
        return Section("cost", title, absent=["There are no records of time and memory."])
    missing = [phase for phase in PHASES if phase not in run.timing]
    absent = [f"There is no record of {', '.join(missing)}."] if missing else []
    caption = "What each phase took when it last ran, and the most memory that its process held."
    drawing = Drawing("cost", caption, lambda width: figures.cost(seconds, peaks, width))
    listing = Listing("cost", "Cost of each phase", tables.cost_table(run.timing))
    return Section("cost", title, [], [drawing], [listing], absent)


def _provenance(run: Run, given: Mapping[str, Mapping[str, Any]]) -> Section:
    versions = tables.words_table({"": provenance.versions()}, ("", ""))
    listings = [Listing("versions", "Versions and machine of this report", versions)]
    absent = []
    parameters, origins = provenance.parameters(run, given), provenance.origins(run)
    if parameters:
        table = tables.words_table(parameters, ("parameter", "value"))
        listings.append(Listing("parameters", "Parameters", table, folded=True))
    if origins:
        table = tables.words_table(origins, ("input", "value"))
        listings.append(Listing("inputs", "Inputs and their hashes", table, folded=True))
    unknown = [phase for phase in MANIFESTS if phase not in parameters]
    if unknown:
        absent.append(f"The parameters of {', '.join(unknown)} are not known.")
    return Section("run", "What was run", [], [], listings, absent)
