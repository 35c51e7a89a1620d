"""The configuration of a model, as transformers itself knows it: no code that comes with a model is ever run."""

from __future__ import annotations

from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from apiq.errors import ApiqError
from apiq.files import read_json

NAME = "config.json"


def read_config(folder: Path) -> PretrainedConfig:
    """What config.json in `folder` says, without the code that it may point to (`auto_map`).

    Raises:
        ApiqError: there is no config.json, it cannot be read, or transformers does not know the type of the model.
    """
    path = folder / NAME
    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise ApiqError(f"{path} names no model_type, so transformers cannot make a model of it.")
    if kind not in CONFIG_MAPPING:
        raise ApiqError(
            f"{path} describes a model of type {kind}, which transformers {transformers.__version__} does not know; "
            "apiq runs no code that comes with a model, so install a transformers that knows this type, or take "
            "another model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ApiqError(f"{path} cannot be read: {reason}.") from None
    if hasattr(config, "auto_map"):
        delattr(config, "auto_map")  # or transformers asks at the terminal whether to run it
    return config
