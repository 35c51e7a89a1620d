"""The model card: what a folder holds, how it was made, what was measured, how it is loaded. No date, no machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from apiq.checkpoint import manifest
from apiq.checkpoint.adapter_file import PACKED, adapter_file
from apiq.errors import ApiqError
from apiq.files import read_json

LOADS = {
    "apiq": """import apiq

model = apiq.load("FOLDER").model""",
    "compressed-tensors": """from transformers import AutoModelForCausalLM, CompressedTensorsConfig

# pip install compressed-tensors; vLLM and SGLang read the folder as it is
model = AutoModelForCausalLM.from_pretrained("FOLDER", quantization_config=CompressedTensorsConfig(dequantize=True))""",
    "gptq": """from gptqmodel import GPTQModel

model = GPTQModel.load("FOLDER")""",
    "awq": """from gptqmodel import GPTQModel

model = GPTQModel.load("FOLDER")""",
    "dense": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")""",
}
"""Code that loads a folder, by the quant_method of its config.json."""

_TEMPLATE = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    """---
{{ metadata }}
---

# {{ title }}

{{ summary }}

{% for table in tables if table.rows %}
## {{ table.title }}

| {{ table.head }} | |
|---|---|
{% for name, value in table.rows %}
| {{ name }} | {{ value }} |
{% endfor %}

{% endfor %}
## Use

```python
{{ code }}
```
{% if adapter %}

{{ adapter }}
{% endif %}

Made with [ApiQ](https://arxiv.org/abs/2402.05147).
"""
)


_PEFT = """import apiq
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "FOLDER/adapter")"""


def card(folder: str | Path, base_model: str | None = None, metrics: Mapping[str, Any] | None = None) -> str:
    """The README.md of a quantized or finetuned folder, or of an export: the same folder gives the same text.

    Args:
        folder: what the card is about.
        base_model: the name of the original on the hub.
        metrics: measured numbers by name, nested or not, as `apiq.evaluate` gives them.

    Raises:
        ApiqError: the folder holds no model.
    """
    folder = Path(folder)
    facts = manifest.read(folder)
    finetuned = facts is not None and facts["kind"] == "finetuned"
    config = {} if finetuned else _config(folder)
    quantization = config.get("quantization_config", {})
    kind = quantization.get("quant_method", "apiq" if finetuned else "dense")
    adapter = folder / "adapter/adapter_config.json"
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if finetuned else "transformers",
        tags=sorted({"apiq", "quantization", kind}),
        pipeline_tag="text-generation" if "CausalLM" in str(config.get("architectures")) else None,
    )
    return _TEMPLATE.render(
        metadata=data.to_yaml(),
        title=(base_model or config.get("model_type") or "model").rpartition("/")[2]
        + (" adapter" if finetuned else _bits(facts or {}, quantization)),
        summary=_summary(kind, finetuned),
        tables=[
            {"title": "Quantization", "head": "setting", "rows": _quantization(facts or {}, quantization)},
            {"title": "Adapter", "head": "setting", "rows": _adapter(read_json(adapter)) if adapter.is_file() else []},
            {"title": "Measured", "head": "metric", "rows": _metrics(folder, metrics)},
        ],
        code=LOADS.get(kind, LOADS["dense"]),
        adapter=_beside(folder, kind, finetuned),
    )


def _beside(folder: Path, kind: str, finetuned: bool) -> str | None:
    """How the adapter in `folder` is read, if there is one: `apiq.load` puts it on by itself."""
    file = adapter_file(folder / "adapter")
    if file is None:
        return None
    if file.name == PACKED:
        return "The adapter is in `adapter/`, in few bits; `apiq.load` puts it on, and nothing else reads it."
    if kind != "apiq":
        return 'The adapter is in `adapter/`, in PEFT\'s format: `PeftModel.from_pretrained(model, "FOLDER/adapter")`.'
    below = "the quantized model below it, BASE" if finetuned else "the model without it"
    code = _PEFT.format(base="BASE" if finetuned else "FOLDER")
    return (
        "The adapter is in `adapter/`, in PEFT's format, and `apiq.load` puts it on. PEFT alone puts it on "
        f"{below}:\n\n```python\n{code}\n```"
    )


def _bits(facts: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    divided = facts.get("parameters", {}).get("target_bits")
    if divided is not None:
        return f", {divided} bits in the mean"
    return f", {quantization['bits']} bits" if "bits" in quantization else ""


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ApiqError(f"{folder} holds no model: it has neither config.json nor finetuned adapters.")
    return read_json(folder / "config.json")


def _summary(kind: str, finetuned: bool) -> str:
    if finetuned:
        return "Adapters that were trained on a quantized model, which is needed to use them."
    if kind == "dense":
        return "A model whose weights were quantized to a few bits, written out in full."
    return f"A model in a few bits, in the format of {kind}."


def _quantization(facts: Mapping[str, Any], quantization: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The grid, and of the parameters those that say how it was fitted."""
    rows: list[tuple[str, Any]] = [("method", facts["method"])] if "method" in facts else []
    divided = facts.get("parameters", {}).get("target_bits")
    if divided is not None:
        rows += [("bits, with scales and zero points, divided among the linears", divided)]
    own = ("symmetric", "levels") if divided is not None else ("bits", "group_size", "symmetric", "levels")
    rows += [(name, quantization[name]) for name in own if name in quantization]
    calibration = facts.get("calibration")
    if calibration:
        fitted = ("epochs", "batch_size", "lr_theta", "lr_weight", "lr_adapter")
        rows += [(name, facts["parameters"][name]) for name in fitted if name in facts["parameters"]]
        rows += [(f"calibration {name}", value) for name, value in sorted(calibration.items())]
    refined = facts.get("refined", {})
    rows += [(f"refined, {name}", refined[name]) for name in ("epochs", "generated", "lr_adapter") if name in refined]
    return rows


def _adapter(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = {"peft_type": "type", "r": "rank", "lora_alpha": "alpha"}
    rows = {label: config[name] for name, label in names.items() if config.get(name) is not None}
    others = config.get("rank_pattern")
    if others and config["peft_type"] == "LORA":
        rows |= {
            "rank": f"{min(others.values())} to {config['r']}",
            "alpha": f"{config['lora_alpha']} at {config['r']}",
        }
    return list(rows.items())


def _metrics(folder: Path, measured: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    own = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    rows = [
        (f"{name} bits per weight", f"{value:.4g}") for name, value in own.get("bits", {}).items() if name != "weights"
    ]
    rows += [(name, f"{value:.6g}") for name, value in sorted(own.items()) if name.startswith("held_out")]
    return rows + [(name, f"{value:.6g}") for name, value in _flat(measured or {})]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a nested mapping by their dotted names, in order."""
    rows = []
    for name, value in sorted(values.items()):
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append((f"{prefix}{name}", float(value)))
    return rows
