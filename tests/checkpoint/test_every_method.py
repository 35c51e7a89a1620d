"""Every method at every width runs or is refused; what it deployed is what is read back, and its bits are counted.

The model is one narrow block, and most of its linears carry no adapter: a run takes a fraction of a second.
"""

import itertools

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import apiq.blocks.walk as walk_module
from apiq.checkpoint.accounting import effective_bits, read_header
from apiq.checkpoint.loading import load
from apiq.grids import search
from apiq.methods import METHODS
from apiq.params import QuantizeParams
from apiq.quantization import quantize

SETTINGS = list(itertools.product((1, 2, 3, 4, 8), (False, True), (16, 0)))
"""All bits, symmetry and group size; 16 does not divide the widths."""
SETTINGS += [(1, "balanced", 16), (3, "balanced", 0), (1.58, False, 16)]
SMALL = {"rank": 2, "epochs": 1, "batch_size": 2, "adapter_targets": ["q_proj", "down_proj"]}


def is_refused(method, bits, symmetric):
    """What `apiq.params` is to refuse, and nothing else."""
    if method in ("qlora", "loftq", "lq-lora"):
        return not 2 <= bits <= 4 or symmetric
    return bits == 1 and symmetric is True


def quantized_bytes(folder):
    """Bytes of the tensors of packed linears and of the adapters, from the offsets in the files."""
    total = 0
    for path in sorted(folder.rglob("*.safetensors")):
        for name, entry in read_header(path).items():
            part = name.rpartition(".")[2]
            if part in ("codes", "scales", "scale_ranges", "scale_mean", "zeros") or ".lora_" in name:
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=20, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.15, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("narrow")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_it_runs_and_is_reloaded_or_is_refused(
    narrow, tmp_path, work, monkeypatch, method, bits, symmetric, group_size
):
    settings = {**SMALL, "method": method, "bits": bits, "symmetric": symmetric, "group_size": group_size}
    if is_refused(method, bits, symmetric):
        with pytest.raises(ValidationError, match=r"(bits|symmetric)\|.*\|"):
            QuantizeParams(**settings)
        return
    agree_when_reloaded(narrow, tmp_path, monkeypatch, settings)


OPTIONS = [
    {"method": "loftq", "loftq": {"levels": "uniform"}},
    {"method": "lq-lora", "lq_lora": {"levels": "uniform"}},
    {"method": "gptq", "gptq": {"act_order": True}},
    {"method": "omniquant", "rounding": "soft"},
    {"method": "closed-form", "closed_form": {"codes": "searched"}},
    {"method": "apiq-lw", "ranges": "weight", "rounding": "soft"},
    {"method": "apiq-bw", "ranges": "output", "start": "closed-form"},
]


@pytest.mark.parametrize("bits", [1, 1.58])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_few_levels_without_zero_points_run_with_every_option_of_the_grid(
    narrow, tmp_path, work, monkeypatch, options, bits
):
    settings = {**SMALL, "bits": bits, "symmetric": "balanced", "group_size": 16, **options}
    agree_when_reloaded(narrow, tmp_path, monkeypatch, settings)


def agree_when_reloaded(narrow, tmp_path, monkeypatch, settings):
    """Quantize `narrow`; what is read back computes what was deployed, and its bits are those of its tensors."""
    monkeypatch.setattr(search, "SHARES", (1.0, 0.8, 0.6))
    blocks, deploy = [], walk_module.deploy
    monkeypatch.setattr(walk_module, "deploy", lambda block, *rest: blocks.append(block) or deploy(block, *rest))
    windows = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "quantized"
    result = quantize(narrow, windows, QuantizeParams(**settings), folder)
    model = AutoModelForCausalLM.from_pretrained(narrow)
    model.model.layers[0] = blocks[0]
    with torch.no_grad():
        reloaded, deployed = (each(windows).logits for each in (load(folder, device="cpu").model, model))
    torch.testing.assert_close(reloaded, deployed, rtol=0, atol=1e-5)
    bits_counted = effective_bits(folder)
    assert bits_counted.total * bits_counted.weights / 8 == pytest.approx(quantized_bytes(folder), rel=0.01)
    assert result["effective_bits"] == bits_counted.total
    assert (folder / "adapter").is_dir() == METHODS[settings["method"]].adapted


@pytest.mark.parametrize("method", METHODS)
def test_the_table_and_the_parameters_say_the_same_of_a_method(method):
    params = QuantizeParams(method=method)
    assert params.adapted == METHODS[method].adapted
    assert params.calibrated == METHODS[method].calibrated


@pytest.mark.parametrize("double", [False, True])
def test_scales_are_read_in_their_own_precision_into_a_half_precision_model(narrow, tmp_path, work, double):
    folder = tmp_path / "quantized"
    params = QuantizeParams(**SMALL, method="qlora", bits=4, group_size=8, qlora={"double_quantization": double})
    quantize(narrow, None, params, folder)
    half, full = (load(folder, device="cpu", dtype=dtype).model for dtype in ("bfloat16", "float32"))
    for one, other in zip(half.modules(), full.modules(), strict=True):
        if hasattr(one, "unpacked"):
            assert torch.equal(one.unpacked()[1], other.unpacked()[1])
