"""Shares in percent, and what they are shares of, as text."""

from __future__ import annotations

from itertools import count

BRACKETS = " [{low}, {high}]"
PARENTHESES = " ({low} to {high})"
PLUS_MINUS = " ± {half}"
NOTHING = 1e-9  # shares that differ by less are the same


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
        digits: after the point; None: whole numbers, and no end is 0 or 100 unless it is exactly.
            The value has more of them where it would round to 0 or 100 and is not that.
        sign: "+" shows it for gains too.
        unit: follows the value, such as " %".
        interval: how low and high, or half of what lies between them, are written.
    """
    if value is None:
        return ""
    text = f"{100 * value:{sign}.{_count_digits(value, digits or 0)}f}{unit}"
    if low is None or high is None:
        return text
    if interval == PLUS_MINUS:
        return text + interval.format(half=_write((high - low) / 2, digits))
    return text + interval.format(low=_write(low, digits, sign), high=_write(high, digits, sign))


def format_fraction(share: float) -> str:
    """Return "0.97", with more digits where it would round to 0 or 1 and is not that."""
    return f"{share:.{2 + _count_digits(share, 0)}f}"


def format_n(n: int, facts: int | None) -> str:
    """Return "48/16": questions, and the facts that they are about where these are known."""
    return str(n) if facts is None else f"{n}/{facts}"


def _write(share: float, digits: int | None, sign: str = "") -> str:
    return f"{100 * share:{sign}.{_count_digits(share, 0) if digits is None else digits}f}"


def _count_digits(share: float, fewest: int) -> int:
    """Return how many digits of percent it takes to tell a share from none and from all."""
    if min(abs(share), abs(1 - abs(share))) < NOTHING:
        return fewest
    return next(n for n in count(fewest) if float(f"{100 * abs(share):.{n}f}") not in (0, 100))
