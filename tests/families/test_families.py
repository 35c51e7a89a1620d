"""Every family, whole: quantized, saved, loaded again and used."""

import pytest
import torch
import transformers
from transformers import AutoConfig

import apiq
from apiq.blocks.architecture import find_blocks, linears
from apiq.blocks.capture import PADDING
from apiq.blocks.stream import ModelStream
from apiq.blocks.unfuse import unfuse
from apiq.errors import ApiqError
from apiq.grids.affine import Grid, extrema, fake_quantize, scale_and_zero
from apiq.layers.packed import PackedLinear
from apiq.params import ModelParams, QuantizeParams
from apiq.planning.outline import outline
from apiq.quantization import quantize
from tests.families.zoo import BLOCKS, ENCODERS, WORDS, ZOO

CPU = torch.device("cpu")
GRID = Grid(bits=4, group_size=16, symmetric=False)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))


@pytest.fixture(params=ZOO)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    return getattr(transformers, ZOO[family].head)(ZOO[family].config).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    return tmp_path / "original"


@torch.no_grad()
def rounded(model):
    """The model with every block weight rounded to nearest, in full precision."""
    for block in find_blocks(model).modules:
        for linear in linears(unfuse(block)).values():
            weight = linear.weight.detach()
            s, z = scale_and_zero(*extrema(weight, GRID), GRID)
            linear.weight.copy_(fake_quantize(weight, s, z, GRID))
    return model


def test_a_streamed_block_has_the_weights_of_from_pretrained(folder, model):
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    stream = ModelStream(folder, AutoConfig.from_pretrained(folder), torch.float32, files)
    expected = model.state_dict()
    for index in range(BLOCKS):
        block = stream.load_block(index, CPU)
        for name, value in block.state_dict().items():
            assert torch.equal(value, expected[f"{stream.blocks.path}.{index}.{name}"])
    with stream.rest() as rest:
        for name, value in rest.state_dict().items():
            assert name.startswith(f"{stream.blocks.path}.") or torch.equal(value, expected[name])
    assert all(value.device.type == "meta" for value in stream.model.state_dict().values())


def test_the_reloaded_model_is_the_rounded_one(folder, model, family, tmp_path):
    out = tmp_path / "quantized"
    quantize(folder, None, QuantizeParams(method="rtn", bits=4, group_size=16), out)
    loaded = apiq.load(out).model
    packed = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == sum(ZOO[family].counts)
    tokens = torch.randint(4, WORDS, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, rounded(model)(tokens).logits, rtol=0, atol=1e-5)
        if family not in ENCODERS:
            generated = loaded.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert generated.shape == (2, 15)


def test_fitting_lowers_the_loss_of_every_block_with_padded_windows(folder, family, tmp_path):
    windows = torch.randint(4, WORDS, (4, 16), generator=torch.Generator().manual_seed(0))
    windows[1, 9:] = PADDING
    params = QuantizeParams(
        bits=2, group_size=16, rank=4, epochs=6, lr_adapter=0.01, batch_size=2, second_term=False, seed=0
    )
    result = quantize(folder, windows, params, tmp_path / "quantized")
    assert len(result["blocks"]) == BLOCKS
    for block in result["blocks"]:
        assert block["loss_last"] < block["loss_first"]
    loaded = apiq.load(tmp_path / "quantized").model
    with torch.no_grad():
        assert loaded(torch.randint(4, WORDS, (2, 12))).logits.isfinite().all()


def test_a_checkpoint_without_the_weights_of_a_block_is_refused_before_any_work(tmp_path):
    model = transformers.LlamaForCausalLM(ZOO["llama"].config)
    state = {name: value for name, value in model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "original", state_dict=state)
    with pytest.raises(ApiqError, match=r"no weights, or none of the right shape, for model\.layers\.2\.mlp\.up_proj"):
        quantize(tmp_path / "original", None, QuantizeParams(method="rtn"), tmp_path / "out")


@pytest.mark.parametrize("planned", [False, True])
def test_a_model_whose_experts_are_stacked_in_an_unknown_way_is_refused(tmp_path, planned):
    config = transformers.JetMoeConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2,
        kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.JetMoeForCausalLM(config).save_pretrained(tmp_path / "original")
    with pytest.raises(ApiqError, match=r"95% of the weights of model\.layers\.0 .* mlp\.input_linear\.weight \(4, "):
        if planned:
            outline(ModelParams(source=str(tmp_path / "original")))
        else:
            quantize(tmp_path / "original", None, QuantizeParams(method="rtn", group_size=16), tmp_path / "out")


def test_an_adapter_that_peft_puts_on_a_block_but_not_on_the_model_is_refused_at_once(tmp_path):
    config = transformers.FalconH1Config(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
    )  # fmt: skip
    transformers.FalconH1ForCausalLM(config).save_pretrained(tmp_path / "original")
    windows = torch.randint(4, WORDS, (2, 8))
    with pytest.raises(ApiqError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        quantize(tmp_path / "original", windows, QuantizeParams(group_size=16, rank=4, epochs=1), tmp_path / "out")
