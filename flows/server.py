"""Prefect's temporary server, which answers where a flow is run here and now and no server is set."""

from __future__ import annotations

import signal
import sys

from prefect.client.orchestration import get_client


def start() -> None:
    """Start it, if no server is set, so that neither Ctrl-C ends it before the flow nor SIGTERM leaves it behind.

    A terminal sends Ctrl-C to every process of the group, and without its server a flow would try for minutes to
    report its own end. What is blocked when a process begins stays blocked in it. Prefect ends the server when
    Python exits, which it does not by itself on SIGTERM.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
