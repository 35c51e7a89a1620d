"""Every method at every width runs or is refused; what it deployed is what is read back, and its bits are counted."""

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import apiq.blocks.walk as walk_module
from apiq.checkpoint.accounting import effective_bits, read_header
from apiq.checkpoint.loading import load
from apiq.methods import METHODS
from apiq.params import QuantizeParams

SETTINGS = [(2, False, 0), (2, True, 32), *((b, *how) for b in (1, 2, 3, 4, 8) for how in ((False, 32), (True, 0)))]
"""Every width with either symmetry and with either grouping, and at 2 bits all four pairs of them."""


def is_refused(method, bits, symmetric):
    """What `apiq.params` is to refuse, and nothing else."""
    if method in ("qlora", "loftq"):
        return not 2 <= bits <= 4 or symmetric
    return bits == 1 and symmetric


def quantized_bytes(folder):
    """Bytes of the tensors of packed linears and of the adapters, from the offsets in the files."""
    total = 0
    for path in sorted(folder.rglob("*.safetensors")):
        for name, entry in read_header(path).items():
            part = name.rpartition(".")[2]
            if part in ("codes", "scales", "scale_ranges", "scale_mean", "zeros") or ".lora_" in name:
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_it_runs_and_is_reloaded_or_is_refused(
    original, windows, make, monkeypatch, method, bits, symmetric, group_size
):
    settings = {"method": method, "bits": bits, "symmetric": symmetric, "group_size": group_size}
    if is_refused(method, bits, symmetric):
        with pytest.raises(ValidationError, match=r"(bits|symmetric)\|.*\|"):
            QuantizeParams(**settings)
        return
    blocks = []
    deploy = walk_module.deploy
    monkeypatch.setattr(walk_module, "deploy", lambda block, *rest: blocks.append(block) or deploy(block, *rest))
    folder, result = make(**settings)
    model = AutoModelForCausalLM.from_pretrained(original)
    for index, block in enumerate(blocks):
        model.model.layers[index] = block
    reloaded = load(folder, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(reloaded.model(windows).logits, model(windows).logits, rtol=0, atol=1e-5)
    bits_counted = effective_bits(folder)
    assert bits_counted.total * bits_counted.weights / 8 == pytest.approx(quantized_bytes(folder), rel=0.01)
    assert result["effective_bits"] == bits_counted.total
    assert (folder / "adapter").is_dir() == METHODS[method].adapted


@pytest.mark.parametrize("method", METHODS)
def test_the_table_and_the_parameters_say_the_same_of_a_method(method):
    params = QuantizeParams(method=method)
    assert params.adapted == METHODS[method].adapted
    assert params.calibrated == METHODS[method].calibrated


@pytest.mark.parametrize("double", [False, True])
def test_scales_are_read_in_their_own_precision_into_a_half_precision_model(make, double):
    folder, _ = make(method="qlora", bits=4, group_size=8, qlora={"double_quantization": double})
    half, full = (load(folder, device="cpu", dtype=dtype).model for dtype in ("bfloat16", "float32"))
    for one, other in zip(half.modules(), full.modules(), strict=True):
        if hasattr(one, "unpacked"):
            assert torch.equal(one.unpacked()[1], other.unpacked()[1])
