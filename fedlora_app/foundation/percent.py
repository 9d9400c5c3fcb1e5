"""Shares in percent, and what they are shares of, as text."""

from __future__ import annotations

import math

BRACKETS = " [{low}, {high}]"
PARENTHESES = " ({low} to {high})"
PLUS_MINUS = " ± {half}"


def format_percent(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    *,
    digits: int | None = 1,
    sign: str = "",
    unit: str = "",
    interval: str = BRACKETS,
) -> str:
    """Return "97.2", or "97.2 [93.1, 98.9]" with an interval; "" where there is no value.

    Args:
        value, low, high: shares, in [0, 1], or differences of shares.
        digits: after the point; None: whole numbers, with 0 and 100 only where it is exactly so.
            The value is 100 only where it is, whatever the digits.
        sign: "+" shows it for gains too.
        unit: follows the value, such as " %".
        interval: how low and high, or half of what lies between them, are written.
    """
    if value is None:
        return ""
    text = _write(keep_below_all(value, 1 if digits is None else digits), digits, sign) + unit
    if low is None or high is None:
        return text
    if interval == PLUS_MINUS:
        return text + interval.format(half=_write((high - low) / 2, digits))
    return text + interval.format(low=_write(low, digits, sign), high=_write(high, digits, sign))


def keep_below_all(share: float, digits: int = 1) -> float:
    """Return a share so that it does not round to all where it is not, to digits of percent."""
    least = 10.0 ** -(digits + 2)
    return 1 - least if 1 - least < share < 1 - 1e-9 else share


def format_n(n: int, facts: int | None) -> str:
    """Return "48/16": questions, and the facts that they are about where these are known."""
    return str(n) if facts is None else f"{n}/{facts}"


def _write(share: float, digits: int | None, sign: str = "") -> str:
    if digits is None:
        size, digits = abs(share), 0
        if not (min(size, abs(1 - size)) < 1e-9 or 0.005 <= size < 0.995):
            share, digits = math.copysign(min(max(size, 0.001), 0.999), share), 1
    return f"{100 * share:{sign}.{digits}f}"
