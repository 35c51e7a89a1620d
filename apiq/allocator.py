"""The heap of the C library, which keeps what was freed while what comes next does not fit into the gaps."""

from __future__ import annotations

import ctypes
import platform

M_MMAP_THRESHOLD = -3
"""glibc's number of that setting (malloc.h)."""
MAPPED = 2**20
"""Bytes from which a tensor is given back to the system as soon as it is freed."""


def give_back_freed() -> None:
    """From now on, hand freed tensors of MAPPED bytes and more back to the system, in this process.

    glibc does so from 128 kB on, but with use raises that to 32 MB, and then keeps several times what is alive.
    The price is a page fault for every 4 kB of a new tensor. Another C library than glibc stays as it is.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)
