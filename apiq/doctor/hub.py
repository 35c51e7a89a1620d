"""The Hugging Face hub: can it be reached, and as whom."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
from huggingface_hub import constants, get_session, get_token

from apiq.doctor.finding import Finding

PATIENCE = 3.0
"""Seconds to wait for an answer."""


def check() -> Iterator[Finding]:
    """Access and token."""
    yield access(constants.ENDPOINT, constants.is_offline_mode())
    if get_token() is None:
        yield Finding("hub token", "warning", "none, so gated models such as Llama 2 cannot be had", "hf auth login")
    else:
        yield Finding("hub token", "ok", "there is one")


def access(endpoint: str, offline: bool) -> Finding:
    """Whether `endpoint` answers; being offline is fine for local models and what is in the cache."""
    if offline:
        return Finding("hub", "warning", "switched off by HF_HUB_OFFLINE", "unset it to fetch models and corpora")
    try:
        status = get_session().head(endpoint, timeout=PATIENCE, follow_redirects=True).status_code
    except httpx2.HTTPError as error:
        return Finding(
            "hub", "warning", f"{endpoint} cannot be reached ({type(error).__name__})",
            "connect, set HF_ENDPOINT to a mirror, or use local folders and files",
        )  # fmt: skip
    if status >= 400:
        return Finding("hub", "warning", f"{endpoint} answers {status}", "try later, or set HF_ENDPOINT to a mirror")
    return Finding("hub", "ok", f"{endpoint} answers")
