import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apiq.checkpoint.reading import linear, linear_names
from apiq.errors import ApiqError
from apiq.params import QuantizeParams
from apiq.quantization import quantize
from apiq.reporting.weights import block_shapes
from tests.families.zoo import ZOO

NAMES = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


def test_shapes_are_those_of_the_matrices(original, quantized):
    number, shapes = block_shapes(quantized["apiq-bw"], original, -1)
    assert (number, [shape.name for shape in shapes]) == (1, [f"model.layers.1.{name}" for name in NAMES])
    shape, found = shapes[5], linear(quantized["apiq-bw"], "model.layers.1.mlp.up_proj")
    W = load_file(original / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    AB = 16 / 4 * found.B @ found.A
    assert shape.error_without == pytest.approx(float(torch.dist(W, found.Q) / W.norm()))
    assert shape.error_with == pytest.approx(float(torch.dist(W, found.Q + AB) / W.norm()))
    assert shape.codes == pytest.approx([float((found.codes == code).float().mean()) for code in range(4)])
    bins = shape.weights["A Bᵀ"]
    assert bins.shares == pytest.approx(np.histogram(AB.numpy(), bins.edges)[0] / AB.numel())
    assert all(h.shares.sum() == pytest.approx(1) for h in [*shape.weights.values(), *shape.adapters.values()])


def test_without_adapters_or_full_precision_weights_only_what_there_is(original, quantized):
    _, shapes = block_shapes(quantized["rtn"], None, 0)
    assert all(list(shape.weights) == ["Q"] and not shape.adapters for shape in shapes)
    assert all(shape.error_without is None and shape.error_with is None for shape in shapes)
    _, shapes = block_shapes(quantized["rtn"], original, 0)
    assert all(shape.error_without > 0 and shape.error_with is None for shape in shapes)


@pytest.mark.parametrize("block", [2, -3])
def test_a_block_that_is_not_there_is_refused(quantized, block):
    with pytest.raises(ApiqError, match=rf"report.histogram_block is {block}; it must be 0 to 1"):
        block_shapes(quantized["rtn"], None, block)


def test_weights_of_another_model_are_refused(quantized, tmp_path):
    with pytest.raises(ApiqError, match="not the model that was quantized"):
        AutoModelForCausalLM.from_config(ZOO["gpt2"].config).save_pretrained(tmp_path)
        block_shapes(quantized["rtn"], tmp_path, 0)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_weights_that_are_stored_in_other_shapes_are_compared_too(name, tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ZOO[name].config)
    model.save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", None, QuantizeParams(method="rtn", bits=8, group_size=16), tmp_path / "quantized")
    _, shapes = block_shapes(tmp_path / "quantized", tmp_path / "model", -1)
    assert len(shapes) == len(linear_names(tmp_path / "quantized")) / model.config.num_hidden_layers
    assert all(0 < shape.error_without < 0.02 for shape in shapes)
