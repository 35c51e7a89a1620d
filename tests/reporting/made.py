"""Sweeps as `apiq sweep` leaves them, with numbers made up."""

import json


def sweep(folder, cells, table=None, name="ranks"):
    """Write a sweep as `apiq sweep` does."""
    content = {
        "name": name,
        "title": "Rank & <method>",
        "source": "Figure 6",
        "axes": ["method", "rank"],
        "cells": cells,
    }
    place = folder / name
    place.mkdir(parents=True)
    (place / "cells.json").write_text(json.dumps(content))
    if table is not None:
        (place / "table.md").write_text(table)
    return place


def cell(method, rank, perplexity=None, bits=None, status="done", error=None, **metrics):
    """A cell of such a sweep, measured beside the full-precision model of EVALUATION."""
    if perplexity is not None:
        metrics |= {"full.perplexity.wiki": 7.3891, "full.perplexity.demo": 2.0, "effective_bits": bits}
        metrics |= {
            f"quantized.perplexity.{text}": value for text, value in zip(("wiki", "demo"), perplexity, strict=True)
        }
    labels = {"rank": str(rank), "method": method}
    return {"name": f"ranks-{method}-{rank}", "labels": labels, "status": status, "error": error, "metrics": metrics}
