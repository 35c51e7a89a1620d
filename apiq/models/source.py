"""Where a full-precision model comes from: the demo, a local folder, or the Hugging Face hub at a fixed commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from apiq.errors import ApiqError
from apiq.files import new_folder, read_json
from apiq.models import manifest
from apiq.params import ModelParams
from apiq.progress import Progress, silent

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def fetch(params: ModelParams, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Make the model available and write which it is to `out`/model.json; `locate` takes it from there.

    The demo is trained into `out`. A local folder stays where it is and a hub model in the hub's cache: `out` then
    holds no more than the manifest, with the resolved commit and the hash of each file.

    Returns:
        The manifest.

    Raises:
        ApiqError: there is no such model, it is not whole, or its weights are not in safetensors.
    """
    out = Path(out)
    if params.source == "demo":
        from apiq.models.demo import train_demo

        return train_demo(params.demo, out, progress)
    facts: dict[str, Any] = {"source": params.source, "revision": params.revision}
    if Path(params.source).is_dir():
        folder = _whole(Path(params.source))
        facts |= {"kind": "local", "path": params.source}
    else:
        folder = _whole(snapshot(params.source, params.revision))
        facts |= {"kind": "hub", "repository": params.source, "commit": folder.name}
    with new_folder(out) as new:
        return manifest.write(new, folder, facts, progress)


def locate(source: str | Path) -> Path:
    """The folder with the config.json and the weights of a full-precision model.

    Args:
        source: a folder in Hugging Face format, an `out` of `fetch`, or a hub repository (`NAME` or `NAME@REVISION`).

    Raises:
        ApiqError: there is no such model, it is not whole, or it is no longer what its manifest says.
    """
    folder = Path(source)
    if not folder.is_dir():
        name, _, revision = str(source).partition("@")
        return _whole(snapshot(name, revision or None))
    facts = manifest.read(folder)
    if facts is None:
        return _whole(folder)
    if facts["kind"] == "local":
        folder = Path(facts["path"])
        if not folder.is_dir():
            raise ApiqError(f"the model folder {folder} is gone since {source} was made; put it back.")
    elif facts["kind"] == "hub":
        folder = snapshot(facts["repository"], facts["commit"])
    manifest.verify(facts, folder)
    return _whole(folder)


def _whole(folder: Path) -> Path:
    """`folder`, if it holds a config and every byte of its weights.

    Raises:
        ApiqError: something is missing or cut off; it says what.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / CONFIG).is_file():
        raise ApiqError(f"the folder {folder} is no model in Hugging Face format: it has no {CONFIG}.")
    read_json(folder / CONFIG)
    for name in weight_files(folder):
        if not (folder / name).is_file():
            raise ApiqError(f"the model in {folder} is incomplete: {name}, which {INDEX} lists, is missing.")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ApiqError(f"{folder / name} is damaged or cut off: {' '.join(str(error).split())}.") from None
    return folder


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a model folder, as transformers looks for them: the single one first.

    Raises:
        ApiqError: it has none, or its index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not places or not isinstance(places, dict):
            raise ApiqError(f"{folder / INDEX} is damaged: it lists no weights.")
        return sorted(set(places.values()))
    if any(folder.glob("*.bin")):
        raise _pickled(str(folder))
    raise ApiqError(f"the model in {folder} has no weights; it should hold {WEIGHTS} or {INDEX}.")


def _has_pickles(name: str, commit: str) -> bool:
    from huggingface_hub import HfApi

    try:
        return any(path.endswith(".bin") for path in HfApi().list_repo_files(name, revision=commit))
    except (OSError, ValueError):  # not within reach: what is missing is said without the reason
        return False


def _pickled(place: str) -> ApiqError:
    return ApiqError(
        f"the weights in {place} are pickled (.bin), which apiq does not open; convert them to {WEIGHTS} "
        "with the model's save_pretrained."
    )


def snapshot(name: str, revision: str | None) -> Path:
    """The folder of a hub repository in the hub's cache, its model downloaded if need be; its name is the commit.

    Raises:
        ApiqError: there is no such repository or revision, or it cannot be reached.
    """
    if not _HUB_NAME.fullmatch(name):
        raise ApiqError(f"there is no model folder {name}.")
    from huggingface_hub import errors, snapshot_download

    terms = ["".join(f"[{letter.upper()}{letter}]" for letter in start) + "*" for start in manifest.TERMS]
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*(f"*{suffix}" for suffix in manifest.SUFFIXES), *terms],
                ignore_patterns=["*/*", "consolidated*", "model.*.safetensors"],  # other copies
            )
        )
        if not any(folder.glob("*.safetensors")) and _has_pickles(name, folder.name):
            raise _pickled(name)
        return folder
    except errors.GatedRepoError:
        raise ApiqError(f"{name} is gated: accept its licence on its page, then `hf auth login`.") from None
    except errors.RevisionNotFoundError:
        raise ApiqError(f"{name} has no revision {revision} on the Hugging Face hub.") from None
    except errors.RepositoryNotFoundError:
        raise ApiqError(f"there is no model folder {name}, and no such repository on the Hugging Face hub.") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ApiqError(
            f"there is no model folder {name}, and no repository of that name can be had from the Hugging Face hub: "
            f"{reason}."
        ) from error
