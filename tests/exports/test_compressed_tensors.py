"""compressed-tensors folders, loaded by transformers with that library, are our model."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import apiq
from apiq.checkpoint.loading import load
from apiq.checkpoint.reading import linear_names
from apiq.errors import ApiqError
from apiq.exports.compressed_tensors import check, quantization_config
from apiq.exports.gptq import check_v2
from apiq.exports.source import Source
from apiq.files import read_json, write_json

pytest.importorskip("compressed_tensors")

CASES = [(1, False, 32), (2, True, 0), (2, False, 32), (3, False, 0), (4, True, 64), (8, False, 32)]


def loaded(folder, symmetric, **options):
    """Model of an export; transformers unpacks zero points only while it dequantizes (compressed-tensors 0.20)."""
    if not symmetric:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("bits", "symmetric", "group"), CASES)
def test_it_is_loaded_as_our_model(checkpoint, agree, tmp_path, bits, symmetric, group):
    folder = checkpoint(bits=bits, symmetric=symmetric, group_size=group)
    apiq.export(folder, tmp_path / "out", "compressed-tensors")
    agree(folder, loaded(tmp_path / "out", symmetric))


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, True), (8, False)])
def test_the_library_unpacks_our_codes_scales_and_zero_points(checkpoint, tmp_path, bits, symmetric):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    folder = checkpoint(bits=bits, symmetric=symmetric)
    apiq.export(folder, tmp_path / "out", "compressed-tensors", dtype="float16")
    ours, half = load(folder, device="cpu").model, 2 ** (bits - 1)
    tensors = {
        key: value for path in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(path).items()
    }
    for name in linear_names(folder):
        codes, s, z = ours.get_submodule(name).unpacked()
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        assert shape == codes.shape
        assert torch.equal(
            unpack_from_int32(tensors[f"{name}.weight_packed"], bits, shape).short() + half, codes.short()
        )
        assert torch.equal(tensors[f"{name}.weight_scale"].float(), s)
        if symmetric:
            assert f"{name}.weight_zero_point" not in tensors
        else:
            zeros = unpack_from_int32(tensors[f"{name}.weight_zero_point"], bits, s.shape, packed_dim=0)
            assert torch.equal(zeros.short() + half, z.short())


def mixed(checkpoint, tmp_path, name):
    """A folder whose config.json says that one linear has 2 bits."""
    folder = shutil.copytree(checkpoint(bits=4), tmp_path / "mixed")
    config = read_json(folder / "config.json")
    config["quantization_config"]["exceptions"] = {name: {"bits": 2}}
    write_json(folder / "config.json", config)
    return Source(folder, None)


def test_each_grid_is_a_group_of_the_configuration(checkpoint, tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    written = quantization_config(mixed(checkpoint, tmp_path, "1.mlp.down_proj"))
    read = QuantizationConfig.model_validate(written)
    bits = {name: group.weights.num_bits for group in read.config_groups.values() for name in group.targets}
    assert len(bits) == 14 and bits.pop("model.layers.1.mlp.down_proj") == 2
    assert set(bits.values()) == {4} and written["ignore"] == ["lm_head"]


def test_linears_that_engines_fuse_share_a_grid(checkpoint, tmp_path):
    with pytest.raises(ApiqError, match=r"fuse \S+\.1\.\S+ with \S+\.1\.self_attn\.[qkv]_proj, .* different grids"):
        check(mixed(checkpoint, tmp_path, "1.self_attn.k_proj"), torch.float32)


def test_gptq_has_one_grid(checkpoint, tmp_path):
    with pytest.raises(ApiqError, match="one grid for all linears"):
        check_v2(mixed(checkpoint, tmp_path, "1.mlp.down_proj"), torch.float16)
