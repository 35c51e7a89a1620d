"""The quantized folder below finetuned adapters: where it lies, and that it is the one which they were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apiq.checkpoint import manifest
from apiq.errors import ApiqError
from apiq.files import relative
from apiq.work import fingerprint


def noted(base: Path, out: Path) -> dict[str, str]:
    """What the manifest of the finetuned folder `out` says of its base: its relative path, and its weights."""
    facts = manifest.read(base)
    return {"base": relative(base, out)} | ({} if facts is None else {"base_weights": _weights(facts)})


def base_of(folder: Path, facts: Mapping[str, Any]) -> Path:
    """The folder below the adapters in `folder`, whose manifest is `facts`.

    Raises:
        ApiqError: it is not there, or its weights are not those which the adapters were trained on.
    """
    base = (folder / facts["base"]).resolve()
    if not base.is_dir():
        raise ApiqError(
            f"{folder} was finetuned on {facts['base']} (seen from it), which is not there; put the base back."
        )
    known, now = facts.get("base_weights"), manifest.read(base)
    if known is not None and now is not None and known != _weights(now):
        raise ApiqError(
            f"{folder} was finetuned on other weights than those in {base} now; put the base back as it was, or "
            "finetune again."
        )
    return base


def _weights(facts: Mapping[str, Any]) -> str:
    """A hash of the weight files of a folder, without its adapters."""
    own = {name: digest for name, digest in facts["files"].items() if "/" not in name}
    return fingerprint({name: digest for name, digest in own.items() if name.endswith(".safetensors")})
