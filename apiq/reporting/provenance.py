"""What was run: parameters, hashes and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from apiq.reporting.gather import Run

PACKAGES = ("apiq", "torch", "transformers", "peft")
SHOWN_ELSEWHERE = ("parameters", "files", "perplexity", "tasks", "models")
"""Keys of manifests that are no facts about the run, or stand in tables of their own."""


def model_name(run: Run) -> str:
    """What to call the model: the name on the hub, the name of its folder, or `the demo model`."""
    manifest = run.manifests.get("model", {})
    if manifest.get("kind") == "demo":
        return "The demo model"
    return manifest.get("repo") or PurePath(manifest.get("path") or manifest.get("source") or "The model").name


def parameters(run: Run) -> dict[str, dict[str, str]]:
    """Phase -> parameter -> value, as the manifests have them."""
    written = {phase: _flat(manifest.get("parameters", {})) for phase, manifest in run.manifests.items()}
    return {phase: values for phase, values in written.items() if values}


def origins(run: Run) -> dict[str, dict[str, str]]:
    """Phase -> what else its manifest says, and the SHA-256 of each of its files."""
    found = {}
    for phase, manifest in run.manifests.items():
        facts = _flat({key: value for key, value in manifest.items() if key not in SHOWN_ELSEWHERE})
        found[phase] = facts | {f"sha256 of {name}": digest for name, digest in manifest.get("files", {}).items()}
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
