"""The methods, what each needs and leaves, and the sections of those with parameters of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer

from apiq.grids.levels import TERNARY
from apiq.refusals import require
from apiq.section import Positive, Rate, Section

Method = Literal[
    "rtn", "gptq", "awq", "omniquant", "qlora", "gptq-lora", "loftq", "lq-lora", "closed-form", "apiq-lw", "apiq-bw"
]


def _whole_or_ternary(bits: float) -> int | float:
    """Whole numbers as such; pydantic would write a field of type float as 2.0 and refuse a union by a longer path."""
    require(bits == TERNARY or bits == int(bits), "", bits, f"a whole number from 1 to 8, or {TERNARY} (ternary)")
    return bits if bits == TERNARY else int(bits)


Bits = Annotated[float, Field(ge=1, le=8), AfterValidator(_whole_or_ternary), PlainSerializer(_whole_or_ternary)]
GroupSize = Annotated[int, Field(ge=0)]
Symmetry = Literal[False, True, "balanced"]
WITHOUT_ADAPTERS = frozenset({"rtn", "gptq", "awq", "omniquant"})
"""Methods that leave nothing to finetune."""
WITHOUT_CALIBRATION = frozenset({"rtn", "qlora", "loftq", "lq-lora"})
"""Methods that look at the weights alone; lq-lora does unless it weights them by their Fisher information."""
NORMAL_FLOAT_BITS = (2, 4)
"""Least and most bits of NormalFloat."""


class GptqParams(Section):
    """Parameters of methods gptq, gptq-lora and of the codes of closed-form."""

    damping: Rate = 0.01
    """Share of the mean diagonal of the Hessian that is added to its diagonal."""
    act_order: bool = False
    """Take the columns by falling diagonal of the Hessian; group ranges are then those of the original weights."""


class OmniquantParams(Section):
    """Parameters of method omniquant; epochs, lr_theta and decay_theta are those of apiq-bw."""

    transform: bool = True
    """Learn factors of the channels too, where a norm or linear of the block can take them up."""
    lr_transform: Rate = 0.005
    """Learning rate of their logarithms."""


class QloraParams(Section):
    """Parameters of method qlora."""

    double_quantization: bool = True
    """Store the scales in 8 bits."""


class LoftqParams(Section):
    """Parameters of method loftq."""

    steps: Positive = 5
    """Times T that the codes and then the adapters are found anew."""
    levels: Literal["normal-float", "uniform"] = "normal-float"
    """Levels of a code: those of NormalFloat, or the affine grid of the other methods."""


class LqLoraParams(Section):
    """Parameters of method lq-lora."""

    steps: Positive = 10
    """Most turns in which the adapters and then the codes are found anew; it ends where a turn gains nothing."""
    levels: Literal["normal-float", "uniform"] = "normal-float"
    """Levels of a code: those of NormalFloat, or the affine grid of the other methods."""
    double_quantization: bool = True
    """Store the scales of NormalFloat in 8 bits."""
    weights: Literal["none", "fisher"] = "none"
    """What an error of a weight counts: the same everywhere, or by its Fisher information, which needs windows."""


class ClosedFormParams(Section):
    """Parameters of method closed-form, and of quantize.start: closed-form."""

    objective: Literal["plain", "whitened", "asymmetric"] = "asymmetric"
    """What A and B minimise for given codes: plain is || W - Q - A B^T || (LoftQ); whitened the change of the output
    on Xq (QERA); asymmetric the distance from the full-precision output on X (ApiQ-lw)."""
    codes: Literal["rtn", "searched", "gptq"] = "gptq"
    """Where the codes of method closed-form come from: rounding to nearest on the whole range of a group or on
    a searched one, or GPTQ on searched ranges."""
    damping: Rate = 0.01
    """Share of the mean diagonal of Xq^T Xq that is added to its diagonal."""
