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
    if _is_plain(value):
        return _plain(value, _decimals(value, digits))
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{_signed(mantissa)}×{_power(int(exponent))}"


def lone_text(value: float) -> str:
    """Write a number that stands alone, to three digits and without zeros at the end: 4.2, 0.001."""
    mantissa, times, power = text_of(value).partition("×")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + times + power


def setting_text(value: float) -> str:
    """Write a number somebody chose, exactly as chosen up to six digits: 0.0003, 10⁻⁸."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return _signed(f"{value:,.6g}" if value < 10_000 else f"{value:,.10g}")
    mantissa, _, exponent = f"{value:.5e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return _power(int(exponent)) if mantissa == "1" else f"{_signed(mantissa)}×{_power(int(exponent))}"


def interval_text(value: float, low: float | None, high: float | None) -> str:
    """Write a value with its interval, to two digits of the interval's half width: 4.20 (4.05 to 4.38)."""
    if low is None or high is None:
        return lone_text(value)
    (*parts, power) = interval_parts(value, low, high)
    return f"{parts[0]} ({parts[1]} to {parts[2]}){f' {power}' if power else ''}"


def interval_parts(value: float, low: float, high: float) -> tuple[str, str, str, str]:
    """Write value, low and high to the same digit, and the power of ten all three are to be multiplied by, if any."""
    trio = (value, low, high)
    largest = max(map(abs, trio))
    if largest < 1e-300 or (largest < 1e15 and all(part.is_integer() for part in trio)):
        return text_of(value), text_of(low), text_of(high), ""
    exponent = 0 if _is_plain(largest) else math.floor(math.log10(largest))
    scaled = [part / 10.0**exponent for part in trio]
    half = max(scaled[2] - scaled[0], scaled[0] - scaled[1])
    decimals = _decimals(half, 2) if half > 0 else 0
    largest = max(map(abs, scaled))
    decimals = min(max(decimals, _decimals(largest, 2)), _decimals(largest, 4))
    # A value too small for the last digit is written out: rounded away it would read as nothing at all.
    tiny = [part != 0 and abs(part) < 0.5 * 10**-decimals for part in scaled]
    power = f"×{_power(exponent)}" if exponent and not any(tiny) else ""
    if exponent and not power:
        return text_of(value), text_of(low), text_of(high), ""
    texts = [text_of(part, 2) if small else _plain(part, decimals) for part, small in zip(scaled, tiny, strict=True)]
    texts = ["0" if part == 0 else text for part, text in zip(scaled, texts, strict=True)]
    return texts[0], texts[1], texts[2], power


def share_of(values: Iterable[float | None]) -> list[float | None]:
    """Return each value's share of the sum of absolute values; None stays None, and all are None if nothing is left."""
    held = list(values)
    total = sum(abs(value) for value in held if value is not None)
    return [None if value is None or total == 0 else abs(value) / total for value in held]


def _is_plain(value: float) -> bool:
    return 1e-3 <= abs(value) < 1e6


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _decimals(value: float, digits: int) -> int:
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])  # of the rounded value: 0.0099999 is 0.0100
    return max(0, digits - 1 - exponent)


def _plain(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}" if abs(value) >= 10_000 else f"{value:.{decimals}f}"
    return _signed(text.lstrip("-") if float(text.replace(",", "")) == 0 else text)


def _signed(text: str) -> str:
    # Screen readers speak U+2212 as "minus" and pass over a hyphen.
    return text.replace("-", "−")
