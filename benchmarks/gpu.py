"""All measurements that need a GPU, one after another; each writes its own JSON into benchmarks/results/.

python -m benchmarks.gpu                 # engine at width 4096 and 8192, one token, then the whole Llama-2-7B shape
python -m benchmarks.gpu --small         # the same code at a small size on whatever device is there
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

FULL = (
    ("benchmarks.engine", "--width 4096 8192 --tokens 2048 --dtypes bfloat16 float32 --rounds 20"),
    ("benchmarks.decode", "--bits 2 3 4"),
    ("benchmarks.model", "--methods apiq-bw"),
    ("benchmarks.model", "--methods apiq-lw"),
)
SMALL = (
    ("benchmarks.engine", "--width 128 --tokens 64 --dtypes float32 bfloat16 --rounds 2"),
    ("benchmarks.decode", "--widths 96 --copies 2 --rounds 1"),
    ("benchmarks.model", "--hidden 128 --inner 344 --rank 8 --windows 4 --length 64 --epochs 2"),
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a trial at small size, on a CPU where no GPU is there")
    parser.add_argument("--out", help="folder of the results")
    chosen = parser.parse_args()
    if not chosen.small and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --small tries the code on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # where Triton's kernels then run
    where = ["--out", chosen.out] if chosen.out else []
    for module, arguments in SMALL if chosen.small else FULL:
        print(f"{module} {arguments}", flush=True)
        subprocess.run([sys.executable, "-m", module, "--device", device, *arguments.split(), *where], check=True)


if __name__ == "__main__":
    main()
