"""Quantize the model and fit its adapters on the calibration windows."""

from apiq.params import Params
from apiq.progress import Progress
from stages import CALIBRATION, MODEL, QUANTIZED, run


def main(params: Params, progress: Progress) -> None:
    """data/model/ and data/calibration/ to data/quantized/."""
    from apiq.calibration.store import read
    from apiq.quantization import quantize

    quantize(MODEL, read(CALIBRATION), params.quantize, QUANTIZED, progress)


if __name__ == "__main__":
    run("quantize", main)
