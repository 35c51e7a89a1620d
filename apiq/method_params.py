"""The methods, what each needs and leaves, and the sections of those with parameters of their own."""

from __future__ import annotations

from typing import Literal

from apiq.section import Section

Method = Literal["rtn", "qlora", "apiq-lw", "apiq-bw"]
WITHOUT_ADAPTERS = frozenset({"rtn"})
"""Methods that leave nothing to finetune."""
WITHOUT_CALIBRATION = frozenset({"rtn", "qlora"})
"""Methods that look at the weights alone."""
NORMAL_FLOAT_BITS = (2, 4)
"""Least and most bits of NormalFloat."""


class QloraParams(Section):
    """Parameters of method qlora."""

    double_quantization: bool = True
    """Store the scales in 8 bits."""
