"""GGUF files, read by the package gguf and by transformers, hold our model; what no block holds is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import apiq
from apiq.checkpoint.loading import load
from apiq.errors import ApiqError
from apiq.exports.gguf_blocks import blocks, fitting
from apiq.files import sha256_folder
from apiq.grids import affine
from apiq.grids.affine import Grid
from apiq.params import QuantizeParams
from apiq.quantization import quantize

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama with more queries than keys and a byte-level tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox and the lazy dog"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "LICENSE").write_text("the terms of use")
    return folder


@settings(max_examples=40)
@given(st.integers(1, 8), st.sampled_from([False, True, "balanced"]), st.sampled_from([32, 64]), st.integers(0, 2**20))
def test_blocks_give_back_the_very_weights(bits, symmetric, width, seed):
    grid = Grid(bits, width, symmetric)
    kind = fitting(grid, 128)
    if kind is None:
        assert bits == 8 and symmetric is not True
        return
    W = torch.randn(3, 128, generator=torch.Generator().manual_seed(seed))
    s, z = affine.scale_and_zero(*affine.extrema(W, grid), grid)
    codes = affine.encode(W, s, z, grid)
    data = blocks(codes, s, z, grid, kind)
    read = gguf.quants.dequantize(data, getattr(gguf.GGMLQuantizationType, kind))
    assert np.array_equal(read, affine.decode(codes, s, z, grid).numpy())


@pytest.mark.parametrize(("width", "kind"), [(32, "Q4_0"), (256, "TQ1_0"), (0, "TQ1_0"), (384, "Q4_0")])
@pytest.mark.parametrize("size", [1.0, 1e-7, 1e4])
def test_ternary_blocks_give_back_the_very_weights(width, kind, size):
    grid, W = Grid(1.58, width, True), size * torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
    W[0, :256] = 0
    s, z = affine.scale_and_zero(*affine.extrema(W, grid), grid)
    codes = affine.encode(W, s, z, grid)
    assert fitting(grid, 768) == kind
    read = gguf.quants.dequantize(blocks(codes, s, z, grid, kind), getattr(gguf.GGMLQuantizationType, kind))
    assert np.array_equal(read, affine.decode(codes, s, z, grid).numpy())


CASES = [(2, False, "Q4_0"), (4, False, "Q5_0"), (8, True, "Q8_0"), (1, "balanced", "Q4_0"), (4, "balanced", "Q5_0")]
CASES += [(1.58, False, "Q4_0")]


@pytest.mark.parametrize(("bits", "symmetric", "kind"), CASES)
def test_transformers_reads_it_as_our_model(checkpoint, llama, agree, tmp_path, bits, symmetric, kind):
    folder = checkpoint(llama, bits=bits, symmetric=symmetric)
    apiq.export(folder, tmp_path / "out", "gguf")
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert types == {kind, "F32"}
    agree(folder, AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf"))


def test_the_same_export_has_the_same_bytes(checkpoint, llama, tmp_path):
    folder = checkpoint(llama, method="apiq-bw", bits=2, adapter="rslora")
    for place in ("a", "b/c"):
        apiq.export(folder, tmp_path / place, "gguf")
    assert sha256_folder(tmp_path / "a") == sha256_folder(tmp_path / "b/c")
    found = sha256_folder(tmp_path / "a").keys()
    assert {"model.gguf", "adapter.gguf", "adapter/adapter_config.json", "LICENSE"} <= found


def test_the_tokenizer_is_read_back(checkpoint, llama, tmp_path):
    folder = checkpoint(llama, symmetric=True)
    apiq.export(folder, tmp_path / "out", "gguf")
    text = "the quick brown fox, 42 dogs"
    ours = AutoTokenizer.from_pretrained(folder)
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 288 and tokens[: len(ours)] == ours.convert_ids_to_tokens(range(len(ours)))
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert theirs(text, add_special_tokens=False).input_ids == ours(text, add_special_tokens=False).input_ids


def test_the_adapter_is_a_gguf_lora(checkpoint, llama, tmp_path):
    folder = checkpoint(llama, method="apiq-bw", bits=2, adapter="rslora")
    apiq.export(folder, tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out/adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    state = load_file(folder / "adapter/adapter_model.safetensors")
    assert len(tensors) == len(state) == 28
    scaling = reader.fields["adapter.lora.alpha"].contents() / 4
    model = load(folder, device="cpu").model.base_model.model
    layer = model.model.layers[1].mlp.down_proj
    delta = scaling * tensors["blk.1.ffn_down.weight.lora_b"] @ tensors["blk.1.ffn_down.weight.lora_a"]
    torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=0, atol=1e-6)
    heads, layer = 4, model.model.layers[0].self_attn.q_proj
    delta = scaling * tensors["blk.0.attn_q.weight.lora_b"] @ tensors["blk.0.attn_q.weight.lora_a"]
    turned = delta.reshape(heads, -1, 2, 64).transpose(1, 2).reshape(64, 64)  # neighbours back into halves
    torch.testing.assert_close(turned, layer.get_delta_weight("default"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"bits": 8}, r"quantize\.symmetric: true, or with quantize\.bits of 7 or less"),
        ({"bits": 8, "symmetric": "balanced"}, r"quantize\.symmetric: true, or with quantize\.bits of 7 or less"),
        ({"group_size": 48}, r"a quantize\.group_size that is a multiple of 32"),
        ({"method": "qlora", "bits": 4}, "no NormalFloat levels"),
        ({"method": "apiq-bw", "bits": 2, "adapter": "dora"}, r"plain LoRA of one rank.*quantize\.adapter: lora"),
    ],
    ids=str,
)
def test_what_no_block_holds_is_refused(checkpoint, llama, tmp_path, values, match):
    with pytest.raises(ApiqError, match=match) as caught:
        apiq.export(checkpoint(llama, **values), tmp_path / "out", "gguf")
    assert str(caught.value).count(". ") == 0 and not list(tmp_path.iterdir())


def test_half_a_scale_that_float16_does_not_hold_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    model = LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "model")
    params = QuantizeParams(method="rtn", bits=2, group_size=32, symmetric="balanced")
    quantize(tmp_path / "model", None, params, tmp_path / "quantized")
    with pytest.raises(ApiqError, match=r"layers\.1\.mlp\.up_proj underflows; .* quantize\.symmetric: true or false"):
        apiq.export(tmp_path / "quantized", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("APIQ_WORK", str(tmp_path / "work"))
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(288)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", None, QuantizeParams(method="rtn", bits=4, group_size=32), tmp_path / "quantized")
    with pytest.raises(ApiqError, match=r"\(WordLevel\) is none that GGUF can describe"):
        apiq.export(tmp_path / "quantized", tmp_path / "out", "gguf")
