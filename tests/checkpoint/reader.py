"""A reader of quantized folders written from docs/reference/format.md alone: nothing of apiq is imported here."""

import hashlib
import json
from statistics import NormalDist

import numpy as np
from safetensors import safe_open


def read(folder):
    """The dequantized weight (out, in) of every packed linear, float32, by name."""
    manifest = json.loads((folder / "apiq.json").read_text())
    assert manifest["format"] <= 5 and manifest["kind"] == "quantized"
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = {}
    for name, shape in index["metadata"]["shapes"].items():
        with safe_open(folder / index["weight_map"][f"{name}.codes"], framework="np") as file:
            own = [key for key in file.keys() if key.startswith(f"{name}.") and not key.endswith(".bias")]  # noqa: SIM118
            tensors = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in own}
        other = config.get("exceptions", {}).get(name.removeprefix(f"{config['blocks']}."), {})
        weights[name] = dequantized(tensors, {**config, **other}, shape)
    return weights


def dequantized(tensors, config, shape):
    b, columns = config["bits"], shape[1]
    group = np.arange(columns) // (min(config["group_size"], columns) or columns)
    codes, s = unpacked(tensors["codes"], b, columns), tensors["scales"]
    if config.get("double_quantization"):
        spread = np.repeat(tensors["scale_ranges"], 256)[: s.size].reshape(s.shape)
        s = scale_levels()[s] * spread + tensors["scale_mean"]
    s = s.astype(np.float32)[:, group]
    if config.get("levels") == "normal-float":
        return s * normal_float_levels(b)[codes]
    fixed = (2**b - 1) / 2 if config["symmetric"] == "balanced" else 1 if b == 1.58 else 2 ** (b - 1)
    z = fixed if config["symmetric"] else unpacked(tensors["zeros"], b, group[-1] + 1)[:, group]
    return s * (codes - z).astype(np.float32) + (tensors["offsets"][:, group] if "offsets" in tensors else 0)


def unpacked(words, b, n):
    if b == 1.58:
        return (unpacked(words, 8, -(-n // 5))[..., None] // 3 ** np.arange(5) % 3).reshape(len(words), -1)[:, :n]
    bits = np.unpackbits(words.astype("<i4").view(np.uint8), axis=1, bitorder="little")[:, : n * b]
    return bits.reshape(len(words), n, b) @ (1 << np.arange(b))


def normal_float_levels(b):
    n, quantile = 2 ** (b - 1), NormalDist().inv_cdf
    above, below = ([quantile(p) for p in np.linspace(0.9677083, 0.5, k + 1)[:-1]] for k in (n, n - 1))
    return (np.sort([*above, 0.0, *(-level for level in below)]) / max(above)).astype(np.float32)


def scale_levels():
    edges = [np.linspace(0.1, 1, 2**k + 1) for k in range(7)]
    half = np.concatenate([(e[1:] + e[:-1]) / 2 * 10.0 ** (k - 6) for k, e in enumerate(edges)])
    return np.sort([0.0, 1.0, *half, *-half]).astype(np.float32)
