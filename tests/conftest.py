"""What all tests share: no network, one thread, nothing of one test left for the next or for the user."""

import os

# Before torch, transformers and datasets are imported, here and in the programs that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # pytest -n 2 keeps two cores busy
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DVC_NO_ANALYTICS"] = "1"

import tempfile

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before transformers imports Triton

os.environ["APIQ_CACHE"] = tempfile.mkdtemp(prefix="apiq-cache-")

settings.register_profile("same-every-time", derandomize=True, deadline=None)
settings.load_profile("same-every-time")


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    """The seed, the default dtype and the gradient mode of torch do not leak from test to test."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
