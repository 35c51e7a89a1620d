"""Train the demo model, or pin a local or hub model down by the hashes of its files."""

from apiq.params import Params
from apiq.progress import Progress
from stages import MODEL, run


def main(params: Params, progress: Progress) -> None:
    """The model section to data/model/."""
    from apiq.models.source import fetch

    fetch(params.model, MODEL, progress)


if __name__ == "__main__":
    run("model", main)
