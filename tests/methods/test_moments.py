"""Moments are those of the tokens that reach a linear, in any batches, without padding, expert or not."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apiq import parallel
from apiq.blocks.activations import Activations, Home
from apiq.blocks.capture import BlockCall
from apiq.methods.inputs import input_order, inputs
from apiq.methods.moments import damped, in_order, moments, settle


def tokens_of(problem, hidden, name):
    return inputs(problem, hidden, problem.block.get_submodule(name)).rows


@pytest.mark.parametrize("batch_size", [1, 4, 6])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_they_are_means_over_all_tokens(problem, name, batch_size):
    X, Xq = (tokens_of(problem, hidden, name).flatten(0, 1) for hidden in (problem.X, problem.Xq))
    found = moments(problem, problem.linears(), name, batch_size, paired=True)
    torch.testing.assert_close(found.G, Xq.t() @ Xq / len(Xq))
    torch.testing.assert_close(found.M, Xq.t() @ X / len(Xq))
    torch.testing.assert_close(found.magnitude, Xq.abs().mean(0))


def test_they_can_be_those_of_the_first_windows(problem):
    first = tokens_of(problem, problem.Xq, "self_attn.q_proj")[:2].flatten(0, 1)
    found = moments(problem, problem.linears(), "self_attn.q_proj", 4, windows=2)
    torch.testing.assert_close(found.G, first.t() @ first / len(first))


class Full(TorchDispatchMode):
    """Memory that runs out once, when for the time `at` a product or sum of moments (32, 32) is made."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.add.Tensor) and result.shape == (32, 32):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError
        return result


def test_a_batch_counts_once_wherever_memory_runs_out(problem):
    expected = moments(problem, problem.linears(), "self_attn.q_proj", 4, paired=True)
    for at in (1, 2, 3, 4):
        with Full(at):
            found = moments(problem, problem.linears(), "self_attn.q_proj", 4, paired=True)
        torch.testing.assert_close(found.G, expected.G)
        torch.testing.assert_close(found.M, expected.M)


def test_padding_does_not_count(problem):
    problem.counted = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    name = "mlp.up_proj"
    X, Xq = (tokens_of(problem, hidden, name)[problem.counted] for hidden in (problem.X, problem.Xq))
    found = moments(problem, problem.linears(), name, 4, paired=True)
    torch.testing.assert_close(found.G, Xq.t() @ Xq / len(Xq))
    torch.testing.assert_close(found.M, Xq.t() @ X / len(Xq))


def test_full_precision_inputs_stay_so_while_the_block_changes(problem):
    original = copy.deepcopy(problem)
    seen = []
    for fed in in_order(problem, 4, paired=True):
        X = tokens_of(original, original.X, fed.name).flatten(0, 1)
        Xq = tokens_of(problem, problem.Xq, fed.name).flatten(0, 1)
        torch.testing.assert_close(fed.moments.M, Xq.t() @ X / len(X))
        assert torch.equal(fed.linear.weight, original.block.get_submodule(fed.name).weight)
        settle(problem, fed.name, fed.linear.weight.round(decimals=1))
        seen.append(fed.name)
    assert seen == list(problem.linears())
    assert not torch.equal(problem.block.mlp.down_proj.weight, original.block.mlp.down_proj.weight)


class Routed(nn.Module):
    """Sends tokens to one of three experts by the sign of their first entry; the last gets none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])

    def forward(self, hidden):
        flat, out = hidden.flatten(0, 1), torch.zeros_like(hidden.flatten(0, 1))
        for number, chosen in enumerate((flat[:, 0] > 0, flat[:, 0] <= 0)):
            if chosen.any():
                out[chosen] = self.experts[number](flat[chosen])
        return out.reshape(hidden.shape)


def test_an_expert_sees_its_own_tokens_and_one_without_any_sees_zero(problem):
    problem.block, problem.call = Routed().requires_grad_(False), BlockCall()
    problem.X, problem.Xq = (Activations(torch.randn(6, 5, 4), Home("device", torch.device("cpu"))) for _ in range(2))
    problem.Xq.rows[0, :, 0] = 1.0  # the first window reaches one expert only
    flat = problem.Xq.rows.flatten(0, 1)
    found = {fed.name: fed.moments for fed in in_order(problem, 2, paired=True)}
    for number, chosen in enumerate((flat[:, 0] > 0, flat[:, 0] <= 0)):
        mine = flat[chosen]
        torch.testing.assert_close(found[f"experts.{number}"].G, mine.t() @ mine / len(mine))
        assert torch.equal(found[f"experts.{number}"].M, found[f"experts.{number}"].G)
    assert not found["experts.2"].G.any()
    assert torch.equal(damped(found["experts.2"].G, 0.01), torch.eye(4))


def test_processes_agree_on_an_order_in_which_no_expert_is_lost(problem, monkeypatch):
    """This process meets expert 1, the other one 0; none meets 2."""
    problem.block, problem.call = Routed().requires_grad_(False), BlockCall()
    problem.X = Activations(-torch.rand(1, 5, 4), Home("device", torch.device("cpu")))

    def gather(orders, order):
        orders[:] = [order, [["experts.0"]]]

    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert input_order(problem, problem.linears()) == [["experts.1"], ["experts.0"], ["experts.2"]]


def test_damping_adds_a_share_of_the_mean_diagonal():
    G = torch.diag(torch.tensor([1.0, 3.0]))
    assert torch.equal(damped(G, 0.5), torch.diag(torch.tensor([2.0, 4.0])))
