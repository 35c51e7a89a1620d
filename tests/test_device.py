"""Which arithmetic auto stands for."""

import pytest
import torch

from apiq.device import pick_dtype, solver_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("able", [{}, {"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_bf16": False}])
def test_the_solver_uses_bfloat16_where_the_processor_multiplies_it(monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    expected = torch.bfloat16 if any(able.values()) else torch.float32
    assert solver_dtype("auto", CPU) == expected
    assert pick_dtype("auto", CPU) == torch.float32
    assert solver_dtype("float32", CPU) == torch.float32
    assert solver_dtype("auto", GPU) == pick_dtype("auto", GPU) == torch.bfloat16
    assert solver_dtype("float16", CPU) == torch.float16
