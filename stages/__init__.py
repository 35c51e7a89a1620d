"""What every stage of the pipeline does around its one call of the library.

A stage is a script `stages/NAME.py` with a `main(params, progress)` that ends in
`run("NAME", main)`. It runs at the root of the repository, as DVC starts it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from apiq.checks import check, known_config
from apiq.errors import ApiqError
from apiq.files import write_json
from apiq.meter import Meter
from apiq.mishaps import mishap
from apiq.overrides import read_yaml
from apiq.params import Params, parse
from apiq.progress import Progress

DATA = Path("data")
MODEL, CALIBRATION, QUANTIZED, REFINED, FINETUNED, EVALUATION, REPORT, TIMING = (
    DATA / name
    for name in ("model", "calibration", "quantized", "refined", "finetuned", "evaluation", "report", "timing")
)
METRICS = DATA / "metrics.json"
"""What DVC compares between runs; in git, beside the outs in DVC's cache."""
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads and the data loaders' forks do not mix
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # matrix products on a GPU are the same in every run
}


def run(name: str, main: Callable[[Params, Progress], object]) -> None:
    """Validate params.yaml as a whole, then do the work of stage `name` with its time and memory on record.

    An ApiqError becomes one sentence on stderr and exit status 2, a mishap of the machine one and status 1. SIGTERM
    unwinds the stage like an exception, so that nothing half-written stays.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        params = read_params()
        from apiq.terminal import progress_bar

        with timed(name), progress_bar(name) as progress:
            main(params, progress)
    except ApiqError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if (told := mishap(error)) is None:
            raise
        print(told, file=sys.stderr)
        sys.exit(1)


def read_params(path: str | Path = "params.yaml") -> Params:
    """The parameters of all stages.

    Raises:
        ApiqError: anything in the file, of this stage or another, that cannot be run.
    """
    params = parse(read_yaml(path))
    check(params, known_config(params.model))
    return params


@contextlib.contextmanager
def timed(name: str, folder: Path = TIMING) -> Iterator[None]:
    """Write `NAME.json` with what the block cost, if it succeeds: apart from the other outs, which are reproducible."""
    meter = Meter()
    yield
    write_json(folder / f"{name}.json", meter.reading())
