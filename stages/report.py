"""Write the report page with its figures and tables."""

from apiq.params import Params
from apiq.progress import Progress
from stages import DATA, REPORT, run


def main(params: Params, progress: Progress) -> None:
    """What all other stages left in data/ to data/report/."""
    from apiq.reporting.page import report

    shown = params.report
    report(DATA, REPORT, shown.title, shown.histogram_block, params.model_dump(mode="json"))


if __name__ == "__main__":
    run("report", main)
