"""The section on the errors of weights and activations by linear."""

from __future__ import annotations

from collections.abc import Sequence

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
        return Section(
            "errors", TITLE, absent=[run.absent.get("errors", "evaluate.errors is off: none were measured.")]
        )
    weights, nearer, activations = weight_panels(run.errors), gains(run.errors), activation_panels(run.errors)
    drawings, absent = [], []
    if nearer:
        caption = (
            "How much nearer to W the quantized weight with its adapters is than the weight rounded to nearest, "
            "in the Frobenius norm, by block (Figure 3 of the paper, with rounding as the baseline)."
        )
        drawings.append(Drawing("weight_gains", caption, lambda width: error_figures.gains(nearer, width)))
    else:
        absent.append("Rounding to nearest was not measured: there is nothing to compare the weights with.")
    caption = "Weight error ‖W \N{MINUS SIGN} (Q + A Bᵀ)‖ of each linear by block (Figure A.1 of the paper)."
    measure = "Frobenius norm"
    drawings.append(
        Drawing("weight_errors", caption, lambda width: error_figures.error_panels(weights, measure, width))
    )
    if any(row.activation_norm is not None for row in run.errors):
        caption = (
            "Activation error ‖X W \N{MINUS SIGN} Xq (Q + A Bᵀ)‖ for one token, of each block and linear, with the "
            "error of all blocks before in Xq (Figure 4 of the paper); dashed, with full-precision input to the block."
        )
        drawings.append(
            Drawing(
                "activation_errors",
                caption,
                lambda width: error_figures.error_panels(activations, "mean norm of a token", width),
            )
        )
    else:
        absent.append("No activations were compared: evaluate.perplexity lists no text.")
    listing = Listing(
        "errors", "Errors relative to the full-precision norm, mean over the blocks", errors_table(run.errors)
    )
    return Section("errors", TITLE, [], drawings, [listing], absent)


def errors_table(errors: Sequence[LinearErrors]) -> Table:
    """The relative errors of each kind of linear, and of the output of the blocks."""
    return Table(
        ("", *MEASURES), (("", tuple(_row(errors, kind) for kind in dict.fromkeys(row.kind for row in errors))),)
    )


def _row(errors: Sequence[LinearErrors], kind: str) -> Row:
    why = "A block has no weight of its own." if kind == BLOCK else "It was not measured, or there is no such thing."
    values = (mean_share(errors, model, kind, error, norm) for model, error, norm in MEASURES.values())
    return (Cell(kind), *(cell(value, why) for value in values))
