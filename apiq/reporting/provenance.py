"""What was run: parameters, hashes and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from apiq.reporting.gather import MANIFESTS, Run

PACKAGES = ("apiq", "torch", "transformers", "peft")
NO_FACTS = ("parameters", "refined", "files", "format", "kind")
"""Keys of manifests that stand elsewhere on the page or say nothing about the run."""
DEMO = "demo"
"""Parameters of the demo model: recorded with it where it was trained, and without effect elsewhere."""
INPUTS = ("model", "calibration")
"""Phases whose files are what the run started from; those of the others are its results."""


def model_name(run: Run) -> str:
    """What to call the model: the name on the hub, the name of its folder, or `the demo model`."""
    manifest = run.manifests.get("model", {})
    names = {
        "demo": "The demo model",
        "hub": manifest.get("repository"),
        "local": PurePath(manifest.get("path", "")).name,
    }
    return names.get(manifest.get("kind", "")) or "The model"


def parameters(run: Run, given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Phase -> parameter -> value: as recorded with the results, else as `given`."""
    found = {}
    for phase in MANIFESTS:
        recorded = "refined" if phase == "refine" else "parameters"  # beside those of quantize
        values = run.manifests.get(phase, {}).get(recorded) or given.get(phase, {})
        if values:
            found[phase] = _flat({key: value for key, value in values.items() if key != DEMO})
    return found


def origins(run: Run) -> dict[str, dict[str, str]]:
    """Phase -> what else its manifest says, and the SHA-256 of each file that the run started from."""
    found = {}
    for phase, manifest in run.manifests.items():
        hashes = manifest.get("files", {}) if phase in INPUTS else {}
        found[phase] = {f"sha256 of {name}": digest for name, digest in hashes.items()}
        found[phase] |= _flat({key: value for key, value in manifest.items() if key not in NO_FACTS})
    return {phase: facts for phase, facts in found.items() if facts}


def versions() -> dict[str, str]:
    """Python, the libraries that decide results, and the class of machine, without its name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found | {"machine": _machine()}


def _machine() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    listed = ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)) or "no GPU"
    return f"{platform.system()} {platform.machine()}, {cores} CPU cores, {listed}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by dotted key, written as in YAML."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _written(value)
    return flat


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return ", ".join(map(_written, value)) or "none"
    return repr(value) if isinstance(value, str) and (not value.strip() or value != value.strip()) else str(value)
