"""GPTQ and AWQ folders: unpacked by the description of their layouts, and loaded by gptqmodel where it is installed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import apiq
from apiq.checkpoint.loading import load
from apiq.checkpoint.reading import linear_names

GPTQ = [("gptq-v2", bits, False) for bits in (2, 3, 4, 8)] + [
    ("gptq-v2", 2, True),
    ("gptq", 4, True),
    ("gptq", 8, True),
]
AWQ = [("awq", 4, False), ("awq", 4, True)]


@pytest.fixture
def exported(checkpoint, tmp_path):
    """The checkpoint, its export, the tensors in it."""

    def export(format, bits, symmetric):
        folder = checkpoint(bits=bits, symmetric=symmetric)
        apiq.export(folder, tmp_path / "out", format)
        files = (tmp_path / "out").glob("*.safetensors")
        return folder, tmp_path / "out", {key: value for path in files for key, value in load_file(path).items()}

    return export


def columns(words, bits):
    """Numbers of `bits` bits from columns of 32-bit words: a column is one stream, lowest bits first."""
    data = np.ascontiguousarray(words.numpy().T).astype("<u4").view(np.uint8)
    stream = np.unpackbits(data, axis=1, bitorder="little")
    return torch.from_numpy(stream.reshape(len(data), -1, bits) @ (1 << np.arange(bits)))


@pytest.mark.parametrize(("format", "bits", "symmetric"), GPTQ)
def test_gptq_unpacked_by_hand_is_ours(exported, format, bits, symmetric):
    folder, out, tensors = exported(format, bits, symmetric)
    config = json.loads((out / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, 32, symmetric)
    model = load(folder, device="cpu").model
    for name in linear_names(folder):
        codes, s, z = model.get_submodule(name).unpacked()
        assert torch.equal(columns(tensors[f"{name}.qweight"], bits), codes.long())
        zeros = columns(tensors[f"{name}.qzeros"].t(), bits) + (config["checkpoint_format"] == "gptq")
        assert torch.equal(zeros.t(), z.long())
        assert torch.equal(tensors[f"{name}.scales"].t().float(), s)
        assert torch.equal(tensors[f"{name}.g_idx"], torch.arange(codes.shape[1]).int() // 32)


@pytest.mark.parametrize(("format", "bits", "symmetric"), AWQ)
def test_awq_unpacked_by_hand_is_ours(exported, format, bits, symmetric):
    folder, _, tensors = exported(format, bits, symmetric)
    model = load(folder, device="cpu").model
    place = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where output 0, 1, ... of eight stands in a word
    for name in linear_names(folder):
        codes, s, z = model.get_submodule(name).unpacked()
        for part, numbers in (("qweight", codes), ("qzeros", z)):
            words = tensors[f"{name}.{part}"]
            nibbles = (words.unsqueeze(-1).long() >> (4 * place)) & 15
            assert torch.equal(nibbles.reshape(len(words), -1).t(), numbers.long())
        assert torch.equal(tensors[f"{name}.scales"].t().float(), s)


@pytest.mark.slow  # half a minute to import gptqmodel and load nine models with it
@pytest.mark.parametrize(("format", "bits", "symmetric"), [*GPTQ, *AWQ])
def test_gptqmodel_loads_it_as_our_model(exported, agree, monkeypatch, format, bits, symmetric):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    gptqmodel = pytest.importorskip("gptqmodel")
    backend = gptqmodel.BACKEND.AWQ_TORCH if format == "awq" else gptqmodel.BACKEND.GPTQ_TORCH
    folder, out, _ = exported(format, bits, symmetric)
    theirs = gptqmodel.GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16).model
    ours = load(folder, device="cpu", dtype="float16").model
    for name in linear_names(folder):
        module = theirs.get_submodule(name)
        eye = torch.eye(module.in_features, dtype=torch.float16)
        bias = 0 if module.bias is None else module.bias
        assert torch.equal((module(eye) - bias).t(), (ours.get_submodule(name)(eye) - bias).t())
    if format == "awq":  # its kernel has no float32, and sums in another order
        agree(folder, theirs, dtype="float16", tolerance=0.05)
    else:
        agree(folder, theirs.float(), dtype="float16")
