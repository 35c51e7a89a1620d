"""The random states of the process, borrowed and given back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def borrowed(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (all devices) for the block, and put their states back after it.

    For libraries that draw from the global generators, such as the Trainer and lm-eval; own code
    takes a `torch.Generator`.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
