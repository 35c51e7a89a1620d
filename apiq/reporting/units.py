"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def known(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float, digits: int = 4) -> str:
    """A finite number to so many significant digits, as a power of ten from 1e6 on and below 1e-3; an int in full."""
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -3 <= power < 6:
        return f"{float(f'{value:.{digits - 1}e}'):,.{max(0, digits - 1 - power)}f}".replace("-", MINUS)
    return f"{mantissa} {TIMES} 10{str(power).translate(RAISED)}".replace("-", MINUS)


def power(value: float) -> str:
    """A number above zero as one digit times a power of ten."""
    mantissa, exponent = f"{value:.0e}".split("e")
    ten = f"10{str(int(exponent)).translate(RAISED)}"
    return ten if mantissa == "1" else f"{mantissa} {TIMES} {ten}"


def signed(value: float, digits: int = 4) -> str:
    """A difference, with its sign also where it is positive."""
    return f"+{number(value, digits)}" if value > 0 else number(value, digits)


def nats(value: float) -> str:
    """A difference of log perplexities, with its sign, to four decimals."""
    text = f"{value:+.4f}"
    return "0.0000" if float(text) == 0 else text.replace("-", MINUS)


def uncertain(value: float, error: float) -> tuple[str, str]:
    """A value and its standard error, both as far as the second digit of the error."""
    if error <= 0:
        return number(value), number(error)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f}".replace("-", MINUS), f"{error:,.{decimals}f}"


def percent(share: float) -> str:
    """A share of one as a percentage: whole, but with one decimal below 10 %."""
    text = f"{100 * share:.0f}" if abs(share) >= 0.0995 or share == 0 else f"{100 * share:.1f}"
    return f"{text.replace('-', MINUS)} %"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours: `4.2 s`, `2 min 05 s`, `1 h 02 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def memory(mebibytes: float) -> str:
    """KiB, MiB or GiB, to three digits."""
    if mebibytes < 0.9995:
        return f"{number(mebibytes * 1024, 3)} KiB"
    return f"{number(float(mebibytes), 3)} MiB" if mebibytes < 1023.5 else f"{number(mebibytes / 1024, 3)} GiB"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each dotted name cut down to the fewest last parts that still tell it from the others."""
    parts = {name: name.split(".") for name in names}

    def short(name: str) -> str:
        for count in range(1, len(parts[name])):
            tail = parts[name][-count:]
            if sum(other[-count:] == tail for other in parts.values()) == 1:
                return ".".join(tail)
        return name

    return {name: short(name) for name in names}
