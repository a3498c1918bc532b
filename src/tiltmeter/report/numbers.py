"""Numbers as text: as many digits as the interval supports, a true minus sign, and never "nan"."""

from __future__ import annotations

import math
from collections.abc import Iterable

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: object) -> float | None:
    """Return a finite number as float, and None for everything else (null, text, bool, not finite)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def numbers(values: object) -> list[float | None]:
    """Return a list of numbers with None where there is none; an empty list for anything that is not a list."""
    return [number(value) for value in values] if isinstance(values, (list, tuple)) else []


def text_of(value: float, digits: int = 3) -> str:
    """Write one number with `digits` significant digits: 4.20, −0.654, 12,346, 1.20×10⁻⁹."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return _signed(f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}")
    return _plain(value, _decimals(value, digits)) if _is_plain(value) else _scientific(value, digits)


def setting_text(value: float) -> str:
    """Write a number somebody chose, exactly as chosen up to six digits: 0.0003, 10⁻⁸."""
    if value == 0 or _is_plain(value):
        return _signed(f"{value:,.6g}" if value < 10_000 else f"{value:,.10g}")
    mantissa, _, exponent = f"{value:.5e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1" else f"{_signed(mantissa)}×{power}"


def interval_text(value: float, low: float | None, high: float | None) -> str:
    """Write a value with its interval, to two digits of the interval's half width: 4.20 (4.05 to 4.38)."""
    if low is None or high is None:
        return text_of(value)
    if all(part == 0 for part in (value, low, high)):
        return "0 (0 to 0)"
    largest = max(abs(value), abs(low), abs(high))
    if not _is_plain(largest):
        return f"{text_of(value)} ({text_of(low)} to {text_of(high)})"
    half = max(high - value, value - low)
    decimals = _decimals(half, 2) if half > 0 else 0
    decimals = min(max(decimals, _decimals(largest, 2)), _decimals(largest, 4))
    return f"{_plain(value, decimals)} ({_plain(low, decimals)} to {_plain(high, decimals)})"


def share_of(values: Iterable[float | None]) -> list[float | None]:
    """Return each value's share of the sum of absolute values; None stays None, and all are None if nothing is left."""
    held = list(values)
    total = sum(abs(value) for value in held if value is not None)
    return [None if value is None or total == 0 else abs(value) / total for value in held]


def _is_plain(value: float) -> bool:
    return 1e-4 <= abs(value) < 1e6


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def _plain(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}" if abs(value) >= 10_000 else f"{value:.{decimals}f}"
    return _signed(text.lstrip("-") if float(text.replace(",", "")) == 0 else text)


def _scientific(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{_signed(mantissa)}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def _signed(text: str) -> str:
    # Screen readers speak U+2212 as "minus" and pass over a hyphen.
    return text.replace("-", "−")
