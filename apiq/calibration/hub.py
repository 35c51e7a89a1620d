"""The corpora of the papers, by name, through `datasets` from the Hugging Face hub (or its cache, when offline)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from apiq.errors import ApiqError


@dataclass(frozen=True)
class HubCorpus:
    """Where a corpus lies on the hub."""

    repository: str
    splits: tuple[str, ...]
    reported: str
    """The split that stands in for one that the corpus does not have, because papers use it."""
    column: str = "text"
    configuration: str | None = None
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    """The one file to read for a split; the whole split where there is none."""
    rows: int | None = None
    """Rows read, the first ones; all of them where this is None."""


CORPORA = {
    "wikitext2": HubCorpus(
        "Salesforce/wikitext", ("train", "validation", "test"), reported="test", configuration="wikitext-2-raw-v1"
    ),
    # The first shards, as GPTQ and its successors use them, and of each as many documents as the validation shard has.
    "c4": HubCorpus(
        "allenai/c4",
        ("train", "validation"),
        reported="validation",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        rows=45_576,
    ),
    # The repository holds a script, which `datasets` no longer runs; the hub's own conversion has the same rows.
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        ("train", "validation", "test"),
        reported="test",
        column="sentence",
        configuration="penn_treebank",
        revision="refs/convert/parquet",
    ),
    # The validation part is what is left of the Pile in public; 16,384 documents are about 100 MB.
    "pile": HubCorpus("mit-han-lab/pile-val-backup", ("validation",), reported="validation", rows=16_384),
}


def rows(name: str, asked: str | None, default: str) -> tuple[Sequence[str], str]:
    """The rows of a split of a corpus, and a line that says what was read.

    Args:
        name: a key of `CORPORA`.
        asked: the split that was asked for by name.
        default: the split otherwise; the reported one takes its place where the corpus has none of that name.

    Raises:
        ApiqError: there is no such split, or it cannot be had from the hub.
    """
    corpus = CORPORA[name]
    if asked is not None and asked not in corpus.splits:
        raise ApiqError(f"the corpus {name} has no split {asked!r}; it has {', '.join(corpus.splits)}.")
    split = asked or (default if default in corpus.splits else corpus.reported)
    part = split if corpus.rows is None else f"{split}[:{corpus.rows}]"
    origin = " ".join(filter(None, [corpus.repository, corpus.configuration, corpus.files.get(split), part]))
    return _load(name, corpus, split, part), origin


def _load(name: str, corpus: HubCorpus, split: str, part: str) -> Sequence[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    files = {split: corpus.files[split]} if split in corpus.files else None
    try:
        loaded = load_dataset(
            corpus.repository, corpus.configuration, data_files=files, split=part, revision=corpus.revision
        )
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ApiqError(
            f"the corpus {name} ({corpus.repository}) cannot be had from the Hugging Face hub: {reason}; connect, "
            "or give a .txt, .jsonl or .parquet file instead."
        ) from error
    return loaded[corpus.column]
