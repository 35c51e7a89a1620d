"""Losses and learning rates for TensorBoard or DVCLive, in a folder of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations.integration_utils import DVCLiveCallback, TensorBoardCallback

from apiq.errors import ApiqError
from apiq.params import FinetuneParams


def tracker(params: FinetuneParams, folder: Path) -> list[TrainerCallback]:
    """The callback of transformers that writes to `folder`, if one is wanted; a resumed run goes on there.

    Raises:
        ApiqError: the package that `finetune.tracking` names is not installed.
    """
    if params.tracking == "none":
        return []
    if importlib.util.find_spec(params.tracking) is None:
        raise ApiqError(
            f"finetune.tracking is {params.tracking}, which is not installed; pip install {params.tracking}, "
            "or set it to none."
        )
    if params.tracking == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardCallback(SummaryWriter(str(folder)))]
    from dvclive.live import Live

    # without these it would make an experiment, a report and a dvc.yaml of its own
    return [DVCLiveCallback(Live(str(folder), resume=folder.exists(), report=None, save_dvc_exp=False, dvcyaml=None))]
