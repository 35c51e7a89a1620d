import importlib.util

import pytest

from apiq.errors import ApiqError
from apiq.files import sha256_folder
from apiq.finetuning import trainer
from apiq.finetuning.run import finetune

# peft 0.21 itself asks transformers for this
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize("name", ["tensorboard", "dvclive"])
def test_losses_are_tracked_beside_an_output_that_stays_the_same(quantized, params, tmp_path, name):
    pytest.importorskip(name)
    finetune(quantized, params, tmp_path / "without")
    finetune(quantized, params.model_copy(update={"tracking": name}), tmp_path / "with")
    assert sha256_folder(tmp_path / "with") == sha256_folder(tmp_path / "without")
    (run,) = (tmp_path / "tracking").iterdir()
    assert run.name.startswith("with-")
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(run)).Reload()
        assert len(read.Scalars("train/loss")) == 12
        assert [event.step for event in read.Scalars("eval/loss")] == [0, 4, 8, 12]
    else:
        assert len((run / "plots/metrics/loss.tsv").read_text().splitlines()) == 13


@pytest.mark.parametrize("name", ["tensorboard", "dvclive"])
def test_a_tracker_that_is_not_installed_is_refused(quantized, params, tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module))
    with pytest.raises(ApiqError, match=f"finetune.tracking is {name}, which is not installed; pip install {name}"):
        finetune(quantized, params.model_copy(update={"tracking": name}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("optimizer", "name"), [("adamw-8bit", "adamw_8bit"), ("paged-adamw-8bit", "paged_adamw_8bit")]
)
def test_8_bit_moments_need_bitsandbytes(params, tmp_path, monkeypatch, optimizer, name):
    params = params.model_copy(update={"optimizer": optimizer})
    monkeypatch.setattr(trainer, "is_bitsandbytes_available", lambda: True)
    assert trainer._arguments(params, tmp_path).optim == name
    monkeypatch.setattr(trainer, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ApiqError, match=f"finetune.optimizer is {optimizer}, which needs bitsandbytes"):
        trainer._arguments(params, tmp_path)
