"""Shares in percent, as text."""

from __future__ import annotations

BRACKETS = " [{low}, {high}]"
PARENTHESES = " ({low} to {high})"
PLUS_MINUS = " ± {half}"


def format_percent(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    *,
    digits: int = 1,
    sign: str = "",
    unit: str = "",
    interval: str = BRACKETS,
) -> str:
    """Return "97.2", or "97.2 [93.1, 98.9]" with an interval; "" where there is no value.

    Args:
        value, low, high: shares, in [0, 1], or differences of shares.
        sign: "+" shows it for gains too.
        unit: follows the value, such as " %".
        interval: how low and high, or half of what lies between them, are written.
    """
    if value is None:
        return ""
    text = f"{100 * value:{sign}.{digits}f}{unit}"
    if low is None or high is None:
        return text
    ends = {"low": low, "high": high, "half": (high - low) / 2}
    sign = "" if interval == PLUS_MINUS else sign
    return text + interval.format(**{k: f"{100 * v:{sign}.{digits}f}" for k, v in ends.items()})
