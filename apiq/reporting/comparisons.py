"""The sections that look beyond this run: one for each sweep, and loss against bits over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from apiq.reporting import results
from apiq.reporting.cells import Cell, Row, Table, cell
from apiq.reporting.gather import Run
from apiq.reporting.pareto import Point, Reference, collect, frontiers
from apiq.reporting.pareto_figure import pareto
from apiq.reporting.parts import Drawing, Listing, Picture, Section
from apiq.reporting.sweeps import DONE, Sweep
from apiq.reporting.units import number


def sweep_section(sweep: Sweep) -> Section:
    """What a sweep found, and which of its cells are missing.

    Raises:
        ApiqError: its table is damaged.
    """
    name = f"sweep-{sweep.name}"
    missing = [each for each in sweep.cells if each.status != DONE]
    done = len(sweep.cells) - len(missing)
    after = f", after {sweep.source} of the paper" if sweep.source else ""
    sentence = f"The sweep {sweep.name}{after}: {done} of {len(sweep.cells)} cells are done."
    table = sweep.table()
    absent = [f"The cell {sweep.title_of(each)} {_fate(each.status)}: {_line(each.error)}" for each in missing]
    absent += [] if table else ["The sweep has no table.md: run it again."]
    pictures = [Picture(name, sweep.caption or f"{sweep.title}.", sweep.figure)] if sweep.figure else []
    pictures += [
        Picture(
            f"{name}-{each.name}-{path.stem}",
            f"{path.stem.replace('_', ' ').capitalize()} of {sweep.title_of(each)}.",
            path,
        )
        for each, path in sweep.drawings()
    ]
    listings = [Listing(name, _heading(table), table)] if table else []
    return Section(name, sweep.title, [sentence, *filter(None, [sweep.about])], pictures, listings, absent)


def _heading(table: Table) -> str:
    names = (*table.head, *(name for name, _ in table.groups))
    return f"Our numbers{' and those of the paper' if any('paper: ' in name for name in names) else ''}"


def pareto_section(run: Run) -> Section:
    """Loss against bits, a plot for each full-precision model and set of texts."""
    title = "Loss against bits"
    groups = collect(run)
    if not groups:
        reason = run.absent.get("evaluation", run.absent.get("quantized", "No losses were measured."))
        return Section("pareto", title, absent=[reason])
    many = len(groups) > 1
    drawings, listings = [], []
    for place, (reference, points) in enumerate(groups.items(), 1):
        name = f"pareto-{place}" if many else "pareto"
        drawings.append(Drawing(name, _caption(reference), lambda width, points=points: pareto(points, width)))
        heading = f"On the frontier, {_texts(reference)}" if many else "On the frontier"
        listings.append(Listing(name, heading, frontier_table(points)))
    sentence = (
        "Each point is a model; none of the others has both fewer bits and a lower loss than one on a frontier. "
        "Models that were finetuned have a frontier of their own."
    )
    absent = [] if run.sweeps else ["No sweep has been run: the points are those of this run alone."]
    return Section("pareto", title, [sentence], drawings, listings, absent)


def frontier_table(points: Sequence[Point]) -> Table:
    """The models on the frontiers by the number that they carry in the figure."""
    places = itertools.count(1)
    groups = tuple(
        (heading, tuple(_corner(next(places), point) for point in corners))
        for heading, corners in zip(("As quantized", "After finetuning"), frontiers(points).values(), strict=True)
        if corners
    )
    return Table(("", "effective bits", "nats lost"), groups)


def _corner(place: int, point: Point) -> Row:
    name = Cell(f"{place} · {point.run}", below=results.KNOWN_MODELS.get(point.model, point.model))
    return (name, cell(point.bits, ""), cell(point.loss, ""))


def _caption(reference: Reference) -> str:
    return (
        "Log perplexity above full precision against effective bits, adapters counted, with the efficient frontier. "
        f"Full precision has perplexity {_texts(reference)}."
    )


def _texts(reference: Reference) -> str:
    return ", ".join(f"{number(value)} on {text}" for text, value in reference)


def _fate(status: str) -> str:
    return {"failed": "failed", "refused": "was refused"}.get(status, f"is {status}")


def _line(error: str | None) -> str:
    return " ".join((error or "no reason was recorded.").split())
