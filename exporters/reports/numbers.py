"""Numbers as people read them: few digits, units, powers of ten written as such."""

from __future__ import annotations

import math

EMPTY = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits: 36.6, 1,384, 0.0953, 2.13×10⁻⁷; EMPTY for None."""
    if value is None:
        return EMPTY
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number
    if -4 < size < 7:
        return _signed(f"{value:,.{max(0, digits - 1 - size)}f}")
    return scientific(value, digits)


def scientific(value: float, digits: int = 3) -> str:
    """2.13×10⁻⁷."""
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return _signed(f"{mantissa}×{power_of_ten(int(power))}")


def trimmed(text: str) -> str:
    """A number as `number` writes it, without zeros behind the point that say nothing."""
    mantissa, times, power = text.partition("×")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + times + power


def power_of_ten(power: int) -> str:
    """10⁻⁷."""
    return f"10{str(power).translate(_SUPERSCRIPT)}"


def percent(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """A share as 87.8 %, or a change as +3.1 %."""
    if value is None:
        return EMPTY
    if not math.isfinite(value):
        return number(value)
    return _signed(f"{100 * value:{'+' if signed else ''}.{digits}f} %")


def seconds(value: float) -> str:
    """A time: 0.42 s, 12.3 s, 3 min 20 s, 1 h 05 min."""
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes with decimal units: 982 kB, 6.30 MB, 15.4 GB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * limit:
            return f"{number(count / limit)} {unit}"
    return f"{count:.0f} B"


def count(value: int) -> str:
    """How many of something large: 3.15 M, 7.24 G; small numbers whole."""
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if value >= 0.9995 * limit:
            return f"{number(value / limit)} {unit}"
    return f"{value:,}"


def _signed(text: str) -> str:
    return text.replace("-", "−")
