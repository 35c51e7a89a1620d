"""A stage that only pretends: it reads its bits, reports a few blocks and writes what dvc.yaml expects.

Copied as stages/NAME.py into a scratch repository. Blocks last STAND_IN_SECONDS each; a file
`break-NAME` at the root makes stage NAME fail once, with the status in it or 1.
"""

import json
import os
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

FOLDERS = {"quantize": "quantized", "refine": "refined", "finetune": "finetuned", "evaluate": "evaluation"}

name = Path(__file__).stem
bits = YAML(typ="safe").load(Path("params.yaml").read_text())["quantize"]["bits"]
broken = Path(f"break-{name}")
if broken.exists():
    status = int(broken.read_text() or 1)
    broken.unlink()
    print("the stand-in was told to fail.", file=sys.stderr)
    sys.exit(status)

for block in range(1, 4):
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
    print(
        f"{name} {block}/3 {block / 3:.0%} block {block}/3 loss {1 / block:.4f} ETA {3 - block} s",
        file=sys.stderr,
        flush=True,
    )

folder = Path("data") / FOLDERS.get(name, name)
folder.mkdir(parents=True, exist_ok=True)
if name in FOLDERS:
    (folder / "metrics.json").write_text(json.dumps({"perplexity": 10.0 - bits, "inner": {"bits": bits}}))
if name == "evaluate":
    Path("data/metrics.json").write_text((folder / "metrics.json").read_text())
if name == "report":
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "report.html").write_text(f"<p>{bits}</p>")
(folder / "out.txt").write_text(f"{name} {bits if name not in ('model', 'calibration') else ''}")
timing = Path("data/timing")
timing.mkdir(parents=True, exist_ok=True)
(timing / f"{name}.json").write_text(json.dumps({"seconds": time.process_time()}))
