"""Prefect flows that run the pipeline: DVC decides what has to run, Prefect when, where and how often.

prefect.toml holds Prefect's settings. What must not depend on the current directory, because
workers start flows elsewhere, is said here, before Prefect is imported.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("PREFECT_HOME", str(ROOT / ".prefect"))
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("DO_NOT_TRACK", "1")
