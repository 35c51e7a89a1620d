"""What is counted before anything is loaded is what the finished folder holds."""

import pytest
import torch
import transformers

from apiq.checkpoint.accounting import effective_bits
from apiq.method_params import WITHOUT_CALIBRATION
from apiq.params import ModelParams, QuantizeParams
from apiq.planning.outline import outline
from apiq.planning.size import result_size, safetensors_bytes
from apiq.quantization import quantize
from tests.families.zoo import WORDS, ZOO


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))


def quantized(config, head, params, tmp_path, dtype=torch.float32):
    """A finished folder, and what is foretold from the config.json of its original alone."""
    torch.manual_seed(0)
    getattr(transformers, head)(config).to(dtype).save_pretrained(tmp_path / "original")
    windows = None if params.method in WITHOUT_CALIBRATION else torch.randint(4, WORDS, (2, 8))
    quantize(tmp_path / "original", windows, params, tmp_path / "quantized")
    (tmp_path / "outline").mkdir()
    (tmp_path / "original" / "config.json").rename(tmp_path / "outline" / "config.json")
    shapes = outline(ModelParams(source=str(tmp_path / "outline")))
    return tmp_path / "quantized", shapes, result_size(shapes, params)


@pytest.mark.parametrize("family", ZOO)
def test_the_bits_and_the_files_of_every_family(family, tmp_path):
    params = QuantizeParams(method="rtn", bits=3, group_size=20)
    folder, shapes, foretold = quantized(ZOO[family].config, ZOO[family].head, params, tmp_path)
    assert foretold.bits == effective_bits(folder)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert foretold.blocks == [sizes[f"block-{index:03d}.safetensors"] for index in range(len(foretold.blocks))]
    assert foretold.rest == pytest.approx(sizes["rest.safetensors"], rel=0.01)
    model = getattr(transformers, ZOO[family].head)(ZOO[family].config)
    assert shapes.parameters() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"method": "apiq-bw", "bits": 2, "rank": 4}, torch.float32),
        ({"method": "apiq-bw", "bits": 4, "symmetric": True, "rank": 3}, torch.bfloat16),
        ({"method": "apiq-lw", "bits": 3, "group_size": 0, "rank": 5}, torch.bfloat16),
        ({"method": "gptq-lora", "bits": 1, "symmetric": "balanced", "rank": 4}, torch.float32),
        ({"method": "closed-form", "bits": 1.58, "rank": 4}, torch.float32),
        ({"method": "qlora", "bits": 4, "group_size": 16, "rank": 4}, torch.bfloat16),
        ({"method": "loftq", "bits": 2, "rank": 4}, torch.float32),
        ({"adapter": "dora", "rank": 4, "adapter_targets": ["attn"]}, torch.float32),
        ({"adapter": "pissa", "rank": 4}, torch.float32),
        ({"adapter": "vera", "rank": 8}, torch.bfloat16),
        ({"adapter": "houlsby", "rank": 4}, torch.float32),
        ({"method": "qlora", "bits": 4, "rank": 4}, torch.bfloat16),
        ({"method": "loftq", "bits": 2, "rank": 4}, torch.float32),
        ({"method": "gptq-lora", "bits": 3, "rank": 4}, torch.float32),
    ],
)
def test_the_bits_with_adapters_and_the_bytes_of_the_folder(values, dtype, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=192, intermediate_size=400, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, dtype=dtype,
    )  # fmt: skip
    params = QuantizeParams(**{"group_size": 64, "epochs": 1, **values})
    folder, _, foretold = quantized(config, "LlamaForCausalLM", params, tmp_path, dtype)
    assert foretold.bits == effective_bits(folder)
    assert foretold.bits.adapters > 0
    assert foretold.adapter == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert foretold.total == pytest.approx(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()), rel=0.01)


def test_the_size_of_a_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        "b.codes": torch.zeros(3, 5, dtype=torch.int32), "a": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2), "scales": torch.zeros(9, dtype=torch.float16), "d": torch.zeros(4, dtype=torch.int64),
    }  # fmt: skip
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, tmp_path / "file.safetensors", metadata)
        assert safetensors_bytes(tensors, metadata) == (tmp_path / "file.safetensors").stat().st_size
