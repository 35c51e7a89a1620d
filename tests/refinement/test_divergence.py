"""The divergence is KL, and with the top k alone the KL of a coarser choice."""

import pytest
import torch
from torch.nn import functional as F

from apiq.refinement.divergence import divergence, top

TEACHER = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STUDENT = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def kl(p, q):
    return float((p * (p / q).log()).sum(-1).mean())


def test_with_the_whole_vocabulary_it_is_the_divergence_of_torch():
    expected = F.kl_div(STUDENT.log_softmax(-1), TEACHER.log_softmax(-1), log_target=True, reduction="none")
    logs, index = top(TEACHER, 11)
    assert index is None
    assert float(divergence(STUDENT, logs, None)) == pytest.approx(float(expected.sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_with_the_top_k_all_other_tokens_are_one(k):
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    _, chosen = p.topk(k, -1)

    def coarser(values):
        kept = values.gather(-1, chosen)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)

    logs, index = top(TEACHER, k)
    found = float(divergence(STUDENT, logs, index))
    assert found == pytest.approx(kl(coarser(p), coarser(q)), rel=1e-4)
    assert found <= kl(p, q) + 1e-6


@pytest.mark.parametrize("k", [3, 11])
def test_it_is_zero_for_the_teacher_itself_and_pulls_towards_it(k):
    logs, index = top(TEACHER, k)
    assert float(divergence(TEACHER, logs, index)) == pytest.approx(0, abs=1e-6)
    logits = STUDENT.float().requires_grad_()
    before = divergence(logits, logs, index)
    before.backward()
    assert divergence(logits.detach() - logits.grad, logs, index) < before


def test_a_token_that_the_teacher_is_sure_of_leaves_the_loss_finite():
    logits = torch.zeros(1, 1, 5)
    logits[..., 2] = 200.0
    logs, index = top(logits, 2)
    student = torch.zeros(1, 1, 5, requires_grad=True)
    loss = divergence(student, logs, index)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
