"""The loss that refinement minimises, as it is differentiated."""

import pytest
import torch

from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.meter import Meter
from apiq.params import RefineParams
from apiq.refinement import run
from apiq.refinement.divergence import top
from apiq.refinement.kept import Kept
from apiq.refinement.teacher import Predictions
from apiq.refinement.trained import Trained

CPU = torch.device("cpu")


def many():
    return torch.randint(0, 61, (1024, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def near(make):
    """Predictions that are near those of the packed model."""
    model = load(make()).model.eval()
    with torch.no_grad():
        logits = model(input_ids=many(), use_cache=False).logits
    return Predictions(*top(logits + 0.03 * torch.randn(61, generator=torch.Generator().manual_seed(2)), 61))


def test_gradients_of_a_small_loss_survive_float16(make, near, monkeypatch, tmp_path):
    objectives, gradients = [], []
    monkeypatch.setattr(run, "descend", lambda groups, objective, *_: objectives.append(objective))
    for name in ("float32", "float16"):
        trained = Trained(load(make(), dtype=name, trainable=True).model.eval(), False)
        lesson = run._Lesson(trained, many(), near, CPU, getattr(torch, name))
        lesson.learn(RefineParams(batch_size=1024), Kept(tmp_path, Meter()), lambda step: None)
        loss, _ = objectives[-1].loss_of(slice(0, 1024))
        assert loss.item() < 0.001
        factor = objectives[-1].scale or 1.0
        (loss * factor).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in trained.adapters]) / factor)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.06  # 0.27 without the factor


def test_the_mean_is_taken_of_fewer_windows_at_a_time_where_memory_runs_out(make, windows, monkeypatch):
    trained = Trained(load(make(), trainable=True).model.eval(), False)
    with torch.no_grad():
        logits = trained.model(input_ids=windows, use_cache=False).logits
    lesson = run._Lesson(trained, windows, Predictions(*top(logits.flip(0), 61)), CPU, torch.float32)
    expected, loss = float(lesson.mean(5, 4)), lesson.loss

    def narrow(batch):
        if batch.stop - batch.start > 2:
            raise torch.OutOfMemoryError
        return loss(batch)

    monkeypatch.setattr(lesson, "loss", narrow)
    assert float(lesson.mean(5, 4)) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(run, "divergence", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(ApiqError, match="not enough memory for the divergence"):
        lesson.mean(5, 4)


def test_the_hidden_states_are_minimised_beside_the_divergence(make, windows, tmp_path):
    """The gradient is that of KL + w ||h - t||^2 / ||t||^2, written down plainly."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(6, 16, 32, generator=generator)
    kept = Kept(tmp_path, Meter())
    for start in (0, 4):
        kept.keep("hidden", start, targets[start : start + 4])
    gradients = []
    for plain in (True, False):
        trained = Trained(load(make(), trainable=True).model.eval(), False)
        model = trained.model
        with torch.no_grad():
            teacher = Predictions(*top(model(input_ids=windows, use_cache=False).logits.flip(0), 61))
        if plain:
            hidden = trained.base.model(input_ids=windows, use_cache=False).last_hidden_state
            divergence = run.divergence(trained.base.lm_head(hidden), teacher.logs, None)
            loss = divergence + 0.7 * (hidden - targets).square().sum() / targets.square().sum()
        else:
            teacher = Predictions(teacher.logs, None, targets.square().mean())
            lesson = run._Lesson(trained, windows, teacher, CPU, torch.float32, kept.rows("hidden"), 0.7)
            loss, divergence = lesson.losses(slice(0, 6))
            assert divergence.item() == pytest.approx(lesson.loss(slice(0, 6)).item())
        loss.backward()
        gradients.append(
            [loss.item(), divergence.item(), torch.cat([each.grad.flatten() for each in trained.adapters])]
        )
    assert gradients[1][:2] == pytest.approx(gradients[0][:2], rel=1e-5)
    torch.testing.assert_close(gradients[1][2], gradients[0][2], rtol=1e-4, atol=1e-7)
