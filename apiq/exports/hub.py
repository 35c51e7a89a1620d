"""`apiq push`: a folder and its card on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from apiq.checkpoint import manifest
from apiq.checkpoint.card import card
from apiq.errors import ApiqError
from apiq.files import read_json


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    metrics: str | Path | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a quantized folder, a finetuned one or an export as one commit, with the card as README.md.

    The folder itself stays as it is.

    Args:
        folder: what is uploaded; with a manifest, every file is verified first.
        repository: OWNER/NAME; it is made if it is not there.
        private: whether a new repository is private.
        base_model: the name of the original on the hub.
        metrics: what `apiq evaluate --json` printed, or the metrics.json of the evaluate stage; results go on the card.
        endpoint: another hub than huggingface.co, or than `$HF_ENDPOINT`.

    Returns:
        The address of the commit.

    Raises:
        ApiqError: the folder is damaged or holds no model, or the hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ApiqError(f"there is no folder {folder}.")
    if manifest.read(folder) is not None:
        manifest.verify(folder)
    text = card(folder, base_model, None if metrics is None else _measured(metrics))
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    files["README.md"] = text.encode()
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    api = HfApi(endpoint=endpoint, library_name="apiq")
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(api.create_commit(name, added, commit_message="Upload with apiq").commit_url)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ApiqError(
            f"{repository} cannot be written on the hub: {reason}; log in with `hf auth login`, and give OWNER/NAME."
        ) from error


def _measured(path: str | Path) -> dict[str, Any]:
    """The results in a JSON file of `apiq evaluate`, without how they were measured.

    Raises:
        ApiqError: the file is missing or holds no results by name.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ApiqError(f"{path} holds no metrics by name; write it with apiq evaluate MODEL --json > metrics.json.")
    return _without_protocol(values)


def _without_protocol(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name != "protocol"}
    return {name: _without_protocol(value) if isinstance(value, Mapping) else value for name, value in kept.items()}
