"""The report: one page that works offline, its figures as files, its tables in Markdown."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from apiq.errors import ApiqError
from apiq.files import new_folder, write_text
from apiq.outputs import require_place
from apiq.reporting import drawing, palette, provenance, results
from apiq.reporting.cells import markdown
from apiq.reporting.gather import Folders, Run, gather
from apiq.reporting.parts import Drawing, Picture, Section
from apiq.reporting.sections import sections
from apiq.reporting.units import duration, known, nats, number

PAGE = "report.html"


def report(
    source: str | Path | Folders,
    out: str | Path,
    title: str = "ApiQ report",
    histogram_block: int = -1,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write `out`/report.html, `out`/figures (PNG and SVG) and `out`/tables (Markdown).

    The same folders give the same bytes on one machine with one set of versions. What was left out, or
    has not been run, is named on the page as absent.

    Args:
        source: the folder that the stages of the pipeline write to, or each of their folders.
        out: folder to write; takes the place of an older one when all is written.
        title: heading of the page.
        histogram_block: block whose histograms are drawn; negative counts from the last.
        parameters: those of each phase, shown where none are recorded with its results.

    Returns:
        The page.

    Raises:
        ApiqError: there is nothing to report, a file is damaged, there is no block `histogram_block`, or `out` is or
            holds a folder that is read, or other files than those of a report.
    """
    run = gather(source if isinstance(source, Folders) else Folders.below(source))
    if not (run.quantization or run.evaluation or run.training or run.timing or run.manifests):
        where = "the given folders" if isinstance(source, Folders) else source
        raise ApiqError(f"there is nothing to report in {where}: run the pipeline first.")
    read = (getattr(run.folders, each.name) for each in fields(run.folders))
    require_place(out, *filter(None, read), mark=PAGE)
    content = sections(run, histogram_block, parameters or {})
    with new_folder(out) as folder:
        (folder / "figures").mkdir()
        drawn = {figure.name: _draw(figure, folder / "figures") for section in content for figure in section.drawings}
        for section in content:
            for listing in section.listings:
                write_text(folder / "tables" / f"{listing.name}.md", markdown(listing.table, listing.title))
        write_text(folder / PAGE, _html(title, run, content, drawn))
    return Path(out) / PAGE


def _draw(figure: Drawing | Picture, folder: Path) -> str:
    """Save a figure, and give it for the page: drawn for a wide and for a narrow screen, of which one is shown."""
    if isinstance(figure, Picture):
        return _copy(figure, folder)
    wide, narrow = (figure.draw(width) for width in (drawing.WIDE, drawing.NARROW))
    documents = {"wide": drawing.svg(wide), "narrow": drawing.svg(narrow)}
    drawing.save(wide, documents["wide"], folder / figure.name)
    return "\n".join(
        drawing.inline(document, f"{figure.name}-{kind}", kind, figure.caption) for kind, document in documents.items()
    )


def _copy(picture: Picture, folder: Path) -> str:
    """The same for a figure that is there already, and is shown on every screen."""
    for path in (picture.svg, picture.svg.with_suffix(".png")):
        if path.is_file():
            shutil.copyfile(path, folder / f"{picture.name}{path.suffix}")
    try:
        document = picture.svg.read_text(encoding="utf-8").replace(drawing.BACKGROUND, "", 1)
        return drawing.inline(document, picture.name, "any", picture.caption)
    except (ElementTree.ParseError, UnicodeDecodeError):
        raise ApiqError(f"{picture.svg} is damaged: it is not SVG; run the sweep again.") from None


def _html(title: str, run: Run, content: list[Section], drawn: dict[str, str]) -> str:
    loader = PackageLoader("apiq.reporting", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        title=title,
        headline=results.headline(run, provenance.model_name(run)).replace(" %", "\N{NO-BREAK SPACE}%"),
        facts=_facts(run),
        sections=content,
        drawn=drawn,
        style=loader.get_source(environment, "style.css")[0],
        colours=palette.variables(),
    )


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers to read first: name, value, remark."""
    facts: list[tuple[str, str, str]] = []
    for text in results.texts(run.evaluation)[:1]:
        for model, name in results.KNOWN_MODELS.items():
            value, lost = results.perplexity(run.evaluation, model, text), results.loss(run.evaluation, model, text)
            if value is not None and model != "rtn":  # with which the headline compares
                remark = f"perplexity on {text}" if model == "full" or lost is None else f"{nats(lost)} nats"
                facts.append((name, number(value), remark))
    total = run.quantization.get("bits", {}).get("total")
    if known(total):
        facts.append(("effective bits", number(total), "per quantized weight"))
    seconds: Any = run.timing.get("quantize", {}).get("seconds")
    if known(seconds):
        facts.append(("quantization", duration(seconds), "on the clock"))
    return facts
