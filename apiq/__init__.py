"""ApiQ: large language models in a few bits, with adapters that undo the damage (arXiv 2402.05147).

Importing `apiq` registers its checkpoints with transformers and its adapters with PEFT, so that
`AutoModelForCausalLM.from_pretrained(FOLDER)` and `PeftModel.from_pretrained(model, FOLDER/"adapter")`
work. The import itself is light: the registration waits for transformers to be imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from apiq.errors import ApiqError

if TYPE_CHECKING:
    from apiq.calibration.mixture import draw_windows
    from apiq.checkpoint.loading import load
    from apiq.evaluation.run import evaluate
    from apiq.exports.hub import push_to_hub
    from apiq.exports.merge import merge
    from apiq.exports.run import export
    from apiq.exports.zeros import merge_into_zeros
    from apiq.finetuning.run import finetune
    from apiq.quantization import quantize
    from apiq.refinement.run import refine
    from apiq.reporting.page import report

__version__ = "0.1.0"
__all__ = [
    "ApiqError",
    "draw_windows",
    "evaluate",
    "export",
    "finetune",
    "load",
    "merge",
    "merge_into_zeros",
    "push_to_hub",
    "quantize",
    "refine",
    "report",
]

_CALLS = {
    "draw_windows": "apiq.calibration.mixture",
    "quantize": "apiq.quantization",
    "refine": "apiq.refinement.run",
    "finetune": "apiq.finetuning.run",
    "evaluate": "apiq.evaluation.run",
    "export": "apiq.exports.run",
    "report": "apiq.reporting.page",
    "merge": "apiq.exports.merge",
    "merge_into_zeros": "apiq.exports.zeros",
    "push_to_hub": "apiq.exports.hub",
    "load": "apiq.checkpoint.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _CALLS:
        raise AttributeError(f"module 'apiq' has no attribute {name!r}")
    return getattr(importlib.import_module(_CALLS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_CALLS})


@wrapt.when_imported("peft")
def _register_adapters(module: Any) -> None:
    importlib.import_module("apiq.adapters.houlsby")


@wrapt.when_imported("transformers.quantizers.auto")
def _register(module: Any) -> None:
    importlib.import_module("apiq.checkpoint.quantizer")


@wrapt.when_imported("peft.utils.transformers_weight_conversion")
def _keep_names(module: Any) -> None:
    importlib.import_module("apiq.checkpoint.peft_names").respect_unfused_experts(module)
