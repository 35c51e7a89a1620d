"""In a process of its own: what is set stays set."""

import platform
import subprocess
import sys

import pytest

MAPPED_PIECES = """
import ctypes
from apiq.allocator import give_back_freed

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Heap, ctypes.c_void_p, [ctypes.c_void_p]

def mapped(size):
    "How many more pieces are mapped while one of this size is alive."
    before = libc.mallinfo2().hblks
    piece = libc.malloc(ctypes.c_size_t(size))
    more = libc.mallinfo2().hblks - before
    libc.free(piece)
    return more

print(mapped(24 << 20), mapped(8 << 20))
give_back_freed()
print(mapped(16 << 20), mapped(1 << 19))  # 8 MB would go where the first ones were
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_freed_tensors_are_given_back_however_many_were_freed_before():
    run = subprocess.run([sys.executable, "-c", MAPPED_PIECES], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "0", "1", "0"]
