"""Which arithmetic auto stands for."""

import contextlib

import pytest
import torch

from apiq.device import SMALL_BLOCK, pick_device, pick_dtype, solver_dtype
from apiq.errors import ApiqError

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


@pytest.mark.parametrize("name", ["float16", torch.float16])
def test_a_precision_goes_by_its_name_or_as_torch_has_it(name):
    assert pick_dtype(name, CPU) == torch.float16


@pytest.mark.parametrize("name", ["fp16", "int8", torch.int8, "nn"])
def test_what_is_no_precision_is_refused(name):
    with pytest.raises(ApiqError, match=f"dtype is {name}; it should be auto, float32, bfloat16, float16"):
        pick_dtype(name, CPU)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", ""])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(ApiqError, match=f"device is {name}; it should be auto, cpu, cuda"):
        pick_device(name)
    assert pick_device(CPU) == pick_device("cpu") == CPU
