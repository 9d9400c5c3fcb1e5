from __future__ import annotations

import pytest

from fedlora_app.foundation.percent import PARENTHESES, PLUS_MINUS, format_fraction, format_percent


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ((0.9721,), {}, "97.2"),
        ((0.9721,), {"digits": 0, "unit": " %"}, "97 %"),
        ((0.972, 0.931, 0.989), {}, "97.2 [93.1, 98.9]"),
        ((-0.417, -0.75, 0.0), {"sign": "+"}, "-41.7 [-75.0, +0.0]"),
        ((0.5, 0.4, 0.6), {"unit": " %", "interval": PARENTHESES}, "50.0 % (40.0 to 60.0)"),
        ((0.5, 0.4, 0.6), {"interval": PLUS_MINUS, "sign": "+"}, "+50.0 ± 10.0"),
        ((0.5, None, None), {"interval": PLUS_MINUS}, "50.0"),
        ((None, None, None), {"unit": " %"}, ""),
        ((0.0004, 0.0, 0.0721), {"digits": None}, "0.04 [0, 7]"),
        ((0.9996, 0.93, 1.0), {"digits": None, "unit": " %"}, "99.96 % [93, 100]"),
        ((-0.0001,), {"digits": None, "sign": "+"}, "-0.01"),
    ],
)
def test_a_share_is_written_with_its_interval(values, settings, expected):
    assert format_percent(*values, **settings) == expected


def test_what_is_not_quite_all_or_none_is_not_printed_as_that():
    shares = (1.0, 2999 / 3000, 287 / 288, 1 / 3000, 1e-12, -1 / 3000, 1 - 1e-12)
    shown = [format_percent(share) for share in shares]
    assert shown == ["100.0", "99.97", "99.7", "0.03", "0.0", "-0.03", "100.0"]
    assert [format_percent(share) for share in (0.9995, 0.0005)] == ["99.95", "0.1"]
    assert format_percent(2999 / 3000, 0.99, 0.9999) == "99.97 [99.0, 100.0]"
    assert [format_percent(share, digits=0) for share in (0.9951, 0.004)] == ["99.5", "0.4"]
    fractions = [format_fraction(share) for share in (0, 0.0004, 0.5, 0.991, 287 / 288, 1)]
    assert fractions == ["0.00", "0.0004", "0.50", "0.99", "0.997", "1.00"]
