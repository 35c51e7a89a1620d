"""Which arithmetic auto stands for."""

import contextlib

import pytest
import torch

from apiq.device import SMALL_BLOCK, pick_dtype, solver_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.mark.parametrize("able", [{}, {"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_bf16": False}])
def test_the_solver_uses_bfloat16_where_the_processor_multiplies_it(monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    expected = torch.bfloat16 if any(able.values()) else torch.float32
    assert solver_dtype("auto", CPU, SMALL_BLOCK + 1) == expected
    assert solver_dtype("auto", CPU, SMALL_BLOCK) == torch.float32
    assert pick_dtype("auto", CPU) == torch.float32
    assert solver_dtype("float32", CPU, 2**40) == torch.float32
    assert solver_dtype("float16", CPU, 1) == torch.float16


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(monkeypatch, native):
    entered = []

    @contextlib.contextmanager
    def on(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    expected = torch.bfloat16 if native else torch.float32
    assert pick_dtype("auto", GPU) == solver_dtype("auto", GPU, 1) == expected
    assert entered == [GPU, GPU]
    assert pick_dtype("bfloat16", GPU) == torch.bfloat16
