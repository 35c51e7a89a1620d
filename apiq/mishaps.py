"""What the machine may refuse in the middle of the work (room on disk, memory, a file), as a sentence for people."""

from __future__ import annotations

import errno
import sys

from safetensors import SafetensorError

GOES_ON = "what is finished is kept, and the same command goes on."
_OF_TORCH_SAVE = "inline_container"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def mishap(error: BaseException) -> str | None:
    """The sentence for an error that says nothing against the code; None for any other, which keeps its traceback."""
    if _is_out_of_memory(error):
        return (
            "the memory of the device is full; lower batch_size of the stage that ran (or length, or compute with "
            f"activation_checkpointing in finetune), end what else uses it, or set device to cpu: {GOES_ON}"
        )
    if isinstance(error, OSError):
        room = "; make room, or point APIQ_WORK and the output to a disk with some" if error.errno in _FULL else ""
        return f"{error}{room}: {GOES_ON}"
    if isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and _OF_TORCH_SAVE in str(error)):
        told = " ".join(str(error).split())
        return f"a file of tensors could not be written or read whole, as when the disk is full ({told}): {GOES_ON}"
    if isinstance(error, MemoryError):
        return f"RAM is full; lower batch_size or windows: {GOES_ON}"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # if it is not imported, the error is none of its
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
