"""The arithmetic of memory and time on numbers that can be checked by hand."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiq.params import FinetuneParams
from apiq.planning import memory
from apiq.planning.forecast import fit, two_sizes
from apiq.planning.step import Pass

BLOCK = memory.BlockSizes(weights=1000, groups=20, adapter=60, moving=0, largest=300, widest=30, small=400)
WORK = Pass(kept=5000, peak=9000, flops_forward=0, flops=0)


def test_a_fitted_block():
    parts = memory.solver("apiq-bw", BLOCK, WORK, passing=700, weight_bytes=2)
    assert parts["block"] == 2000
    assert parts["grids and adapters"] == 4 * (20 * 4 + 60)
    assert parts["optimizer"] == 4 * 5 * (2 * 20 + 60)  # two moments, three copies of the last good state
    assert parts["step"] == 9000
    assert memory.solver("apiq-bw", BLOCK, WORK, passing=10**5, weight_bytes=2)["step"] == 10**5
    moving = memory.solver("apiq-bw", dataclasses.replace(BLOCK, moving=900), WORK, passing=700, weight_bytes=2)
    assert sum(moving.values()) - sum(parts.values()) == 4 * 6 * 900


def test_packing_a_large_linear_outweighs_a_small_step():
    small = Pass(kept=0, peak=100, flops_forward=0, flops=0)
    assert memory.solver("apiq-bw", BLOCK, small, 700, 2)["step"] == 25 * 300
    assert memory.solver("rtn", BLOCK, WORK, 700, 2) == {"block": 2000, "moments": 0, "step": 25 * 300}


def test_what_other_methods_hold():
    assert memory.solver("gptq", BLOCK, WORK, 700, 2)["moments"] == 6 * 4 * 30**2
    ranges = memory.solver("omniquant", BLOCK, WORK, 700, 2)
    assert ranges["optimizer"] == 4 * 5 * 2 * 20
    assert ranges["step"] == 9000 + 3 * 4 * 1000


def test_activations_and_their_copies():
    assert memory.activations(windows=3, length=5, width=7, item_bytes=2) == 210
    assert memory.copies_alive("rtn", True, 4) == 4
    assert memory.copies_alive("apiq-lw", True, 4) == 11
    assert memory.copies_alive("apiq-bw", True, 4) == memory.copies_alive("apiq-bw", False, 4) + 1


@pytest.mark.parametrize(
    ("wanted", "gpu", "ram", "home"),
    [("auto", None, 80, "ram"), ("auto", None, 79, "disk"), ("auto", 80, 0, "gpu"), ("auto", 79, 80, "ram"),
     ("auto", 79, 79, "disk"), ("memory", 80, 0, "ram"), ("device", None, 0, "ram"), ("device", 1, 80, "gpu"),
     ("disk", 80, 80, "disk")],
)  # fmt: skip
def test_the_home_of_40_bytes(wanted, gpu, ram, home):
    assert memory.home(wanted, 40, gpu, ram) == home


def test_the_worse_moment_counts():
    work = {"block": 50, "activations": 30}
    assert memory.host(work, embeddings=40, one_set=10) == work
    assert memory.host(work, embeddings=90, one_set=10) == {"embeddings": 90, "activations": 10}


def test_the_allocator_keeps_what_was_alive_or_the_small_weights_of_a_few_blocks():
    assert memory.allocator(10**6, BLOCK, 4, blocks=1) == 0
    assert memory.allocator(10**6, BLOCK, 4, blocks=3) == 10**6
    assert memory.allocator(1, BLOCK, 4, blocks=3) == 3 * 1600
    assert memory.allocator(1, BLOCK, 4, blocks=80) == memory.KEPT * 1600


def training(checkpointing, blocks=4, optimizer="adamw"):
    return memory.training(
        packed=100, outside=10, item_bytes=2, adapter=5, moments=memory.STATES[optimizer], work=WORK,
        blocks=blocks, entry=64, head=600, checkpointing=checkpointing, dequantized=50,
    )  # fmt: skip


def test_training_with_and_without_checkpointing():
    without, with_it = training(False), training(True)
    assert without["packed model"] == with_it["packed model"] == 120
    assert without["adapters and optimizer"] == 16 * 5
    assert without["activations"] == 4 * 5000
    assert without["step"] == 9000 - 5000
    assert with_it["activations"] == 4 * 64
    assert with_it["step"] == 9000
    assert training(False, optimizer="adamw-8bit")["adapters and optimizer"] == 10 * 5


def test_the_moments_of_every_optimizer_are_counted():
    known = typing.get_args(FinetuneParams.model_fields["optimizer"].annotation)
    assert set(memory.STATES) == set(known)


seconds = st.floats(0.01, 100)


@given(seconds, seconds, seconds, st.integers(2, 20), st.integers(1, 8))
def test_the_three_costs_are_found_again(c, p, s, batches, epochs):
    few, many = c + p, c + p * batches
    found = fit(few, many, many + s * batches * epochs, (1, batches), epochs)
    assert found == pytest.approx((c, p, s), rel=1e-6, abs=1e-6)


@given(seconds, seconds)
def test_noise_gives_no_negative_cost(few, many):
    assert min(fit(few, many, min(few, many) / 2, (1, 4), 2)) >= 0
    assert min(two_sizes(few, many, (10.0, 2.0))) >= 0


def test_a_line_through_two_sizes():
    assert two_sizes(3 + 2 * 10, 3 + 2 * 4, (10, 4)) == pytest.approx((3, 2))
