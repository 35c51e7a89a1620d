"""Train adapters and scales end to end against the full-precision model, or leave them as they are."""

from apiq.params import Params
from apiq.progress import Progress
from stages import CALIBRATION, MODEL, QUANTIZED, REFINED, run


def main(params: Params, progress: Progress) -> None:
    """data/quantized/, data/model/ and the windows of data/calibration/ to data/refined/."""
    if not params.refine.epochs:
        from apiq.checkpoint.rewriting import copied

        copied(QUANTIZED, REFINED)
        return
    from apiq.calibration.store import read
    from apiq.refinement.run import refine

    refine(QUANTIZED, MODEL, read(CALIBRATION), params.refine, REFINED, progress)


if __name__ == "__main__":
    run("refine", main)
