"""The outs of a small pipeline run: a real, tiny quantized Llama, and made-up numbers of the other stages."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apiq.checkpoint.loading import full_precision, load
from apiq.evaluation.errors import errors, write_errors
from apiq.models.source import fetch
from apiq.params import ModelParams, QuantizeParams
from apiq.quantization import quantize

EVALUATION = {
    "full": {
        "perplexity": {"wiki": 7.3891, "demo": 2.0},
        "tasks": {"sums": {"acc": 0.5, "acc_stderr": 0.021}, "prose": {"bits_per_byte": 1.25}},
    },
    "quantized": {
        "perplexity": {"wiki": 20.086, "demo": 8.0},
        "tasks": {"sums": {"acc": 0.3, "acc_stderr": 0.019}, "prose": {"bits_per_byte": 2.25}},
    },
    "finetuned": {
        "perplexity": {"wiki": 12.182, "demo": 4.0},
        "tasks": {"sums": {"acc": 0.4, "acc_stderr": 0.02}, "prose": {"bits_per_byte": 1.5}},
    },
}
LOG = "step,loss,held_out_loss,learning_rate\n0,,2.75,\n1,2.5,,0.001\n2,2.25,2.125,0.0005\n"
COSTS = {
    "model": {"seconds": 125.0, "cpu_seconds": 240.0, "peak_memory_mb": 900.0},
    "quantize": {"seconds": 3725.0, "cpu_seconds": 4000.0, "peak_memory_mb": 2048.0},
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A random Llama of two blocks in Hugging Face format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("original")
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(original, tmp_path_factory):
    """Method -> the folder of the tiny model quantized by it."""
    windows = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APIQ_WORK", str(tmp_path_factory.mktemp("work")))
        for method in ("apiq-bw", "rtn"):
            params = QuantizeParams(method=method, bits=2, group_size=16, rank=4, epochs=2, device="cpu")
            folders[method] = tmp_path_factory.mktemp("made") / method
            quantize(original, windows if method == "apiq-bw" else None, params, folders[method])
    return folders


@pytest.fixture(scope="session")
def measured(original, quantized):
    """The errors of both, as the evaluation measures them."""
    windows, stream = torch.arange(24).view(3, 8), full_precision(original).stream
    return {
        name: list(errors(stream, load(quantized[method], device="cpu"), windows))
        for name, method in (("rtn", "rtn"), ("quantized", "apiq-bw"))
    }


@pytest.fixture(scope="session")
def data(original, quantized, measured, tmp_path_factory):
    """The folder that the stages write to, after all of them."""
    folder = tmp_path_factory.mktemp("run") / "data"
    fetch(ModelParams(source=str(original)), folder / "model")
    (folder / "quantized").symlink_to(quantized["apiq-bw"])
    write(folder / "calibration/manifest.json", {"corpus": {"name": "wiki", "sha256": "c0ffee"}, "windows": 2})
    write(folder / "finetuned/apiq.json", {"kind": "finetuned", "parameters": {"epochs": 1.5}, "files": {}})
    write(folder / "finetuned/log.csv", LOG)
    write(folder / "evaluation/metrics.json", EVALUATION)
    protocol = {"perplexity": {"demo": {"windows": 17, "sha256": "decade"}}, "tasks": {}}
    write(
        folder / "evaluation/results.json",
        {name: {**values, "protocol": protocol} for name, values in EVALUATION.items()},
    )
    write_errors(folder / "evaluation/errors.csv", measured)
    for phase, cost in COSTS.items():
        write(folder / f"timing/{phase}.json", cost)
    return folder
