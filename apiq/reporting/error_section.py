"""The section on the errors of weights and activations by linear."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from apiq.reporting import error_figures
from apiq.reporting.cells import Cell, Row, Table, cell
from apiq.reporting.error_lines import BASELINE, METHOD, activation_panels, gains, mean_share, weight_panels
from apiq.reporting.errors import BLOCK, LinearErrors
from apiq.reporting.gather import Run
from apiq.reporting.parts import Drawing, Listing, Section

TITLE = "Errors of weights and activations"
FACTORS = ("awq", "omniquant")
"""Methods that move factors between the linears and norms of a block."""
MEASURES = {
    "weight, rounded": (BASELINE, lambda row: row.weight_error, lambda row: row.weight_norm),
    "without adapters": (METHOD, lambda row: row.weight_error_without, lambda row: row.weight_norm),
    "with adapters": (METHOD, lambda row: row.weight_error_with, lambda row: row.weight_norm),
    "activation, rounded": (BASELINE, lambda row: row.activation_error_accumulated, lambda row: row.activation_norm),
    "quantized": (METHOD, lambda row: row.activation_error_accumulated, lambda row: row.activation_norm),
}
"""Column -> the model, its error, and what the error is divided by."""


def error_section(run: Run) -> Section:
    """Figures 3, 4 and A.1 of the paper from this run."""
    if not run.errors:
        reason = run.absent.get("errors", "evaluate.errors is off: none were measured.")
        return Section("errors", TITLE, absent=[reason])
    drawings = [*_gains(run.errors), _weights(run.errors), *_activations(run.errors)]
    drawn, absent = {drawing.name for drawing in drawings}, []
    if "weight_gains" not in drawn:
        absent.append("Rounding to nearest was not measured: there is nothing to compare the weights with.")
    if "activation_errors" not in drawn:
        absent.append("No activations were compared: evaluate.perplexity lists no text.")
    if run.quantization.get("method") in FACTORS:
        absent.append("Factors that the method moved between linears and norms are in the errors of these linears.")
    title = "Errors relative to the full-precision norm, mean over the blocks"
    return Section("errors", TITLE, [], drawings, [Listing("errors", title, errors_table(run.errors))], absent)


def _gains(errors: Sequence[LinearErrors]) -> list[Drawing]:
    nearer = gains(errors)
    caption = (
        "How much nearer to W the quantized weight with its adapters is than the weight rounded to nearest, "
        "in the Frobenius norm, by block (Figure 3 of the paper, with rounding as the baseline)."
    )
    return [Drawing("weight_gains", caption, partial(error_figures.gains, nearer))] if nearer else []


def _weights(errors: Sequence[LinearErrors]) -> Drawing:
    lines = weight_panels(errors)
    caption = "Weight error ‖W \N{MINUS SIGN} (Q + A Bᵀ)‖ of each linear by block (Figure A.1 of the paper)."
    return Drawing("weight_errors", caption, partial(error_figures.error_panels, lines, "Frobenius norm"))


def _activations(errors: Sequence[LinearErrors]) -> list[Drawing]:
    lines = activation_panels(errors)
    caption = (
        "Activation error ‖X W \N{MINUS SIGN} Xq (Q + A Bᵀ)‖ for one token, of each block and linear, with the error "
        "of all blocks before in Xq (Figure 4 of the paper); dashed, with full-precision input to the block."
    )
    draw = partial(error_figures.error_panels, lines, "mean norm of a token")
    return [Drawing("activation_errors", caption, draw)] if lines else []


def errors_table(errors: Sequence[LinearErrors]) -> Table:
    """The relative errors of each kind of linear, and of the output of the blocks."""
    return Table(
        ("", *MEASURES), (("", tuple(_row(errors, kind) for kind in dict.fromkeys(row.kind for row in errors))),)
    )


def _row(errors: Sequence[LinearErrors], kind: str) -> Row:
    why = "A block has no weight of its own." if kind == BLOCK else "It was not measured, or there is no such thing."
    values = (mean_share(errors, model, kind, error, norm) for model, error, norm in MEASURES.values())
    return (Cell(kind), *(cell(value, why) for value in values))
