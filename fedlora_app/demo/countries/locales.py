"""What Unicode's CLDR says of a country's language and formats, read through ``babel``.

Readers as in ``sources``: None where a country has several official languages, or a calendar or
digits of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

from fedlora_app.demo.countries.sources import MONTHS, WEEKDAYS, clean, parse_day, require

SPANS = {
    "in three days": ("day", timedelta(days=3)),
    "two days ago": ("day", timedelta(days=-2)),
    "in four hours": ("hour", timedelta(hours=4)),
    "five weeks ago": ("week", timedelta(weeks=-5)),
}
LANGUAGES = {"English": "en", "Italian": "it", "Russian": "ru", "Chinese": "zh"}
MANY_LANGUAGES = {"ZA"}  # twelve official ones, of which CLDR marks one
NO_GREGORIAN_FORMATS = {"EG", "IL", "IN", "TH"}  # another calendar, digits or order beside ours


@cache
def _languages(code: str, *, de_facto: bool = False) -> tuple[str, ...]:
    require("babel")
    find = importlib.import_module("babel.languages").get_official_languages
    return () if code in MANY_LANGUAGES else find(code, de_facto=de_facto)


@cache
def _find_locale(code: str) -> Any:
    """Return the locale of the first official language that CLDR knows in the country."""
    babel = require("babel")
    for name in _languages(code, de_facto=True):
        # What one locale resolves is kept in data that others inherit (Babel's issue 1234), so
        # that Japanese months would depend on whether Chinese ones were read before.
        importlib.import_module("babel.localedata")._cache.clear()
        try:
            locale = babel.Locale.parse(f"{name}_{code}")
        except babel.UnknownLocaleError:  # a group of languages, such as Norwegian
            continue
        locale.months  # noqa: B018 - loads the data, which are then this locale's own
        return locale
    return None


def _format_locale(code: str) -> Any:
    """Return the locale of a country in which one language is in use, None for all others."""
    is_single = len(_languages(code, de_facto=True)) == 1 and code not in NO_GREGORIAN_FORMATS
    return _find_locale(code) if is_single else None


def _official_locale(code: str) -> Any:
    """Return the locale of the only official language, None where there are more or none."""
    return _find_locale(code) if len(_languages(code)) == 1 else None


def _foreign_locale(code: str) -> Any:
    """Return the locale of the only official language if that is not English."""
    locale = _official_locale(code)
    return None if locale is None or locale.language == "en" else locale


def language(code: str, _: str = "") -> str | None:
    """Return the official language in English, if there is only one."""
    locale = _official_locale(code)
    return locale.get_language_name("en") if locale else None


def language_itself(code: str, _: str = "") -> str | None:
    """Return what the official language calls itself."""
    locale = _foreign_locale(code)
    return clean(locale.get_language_name(locale.language)) if locale else None


def month_word(code: str, month: str) -> str | None:
    """Return an English month in the official language."""
    return _word(code, month, lambda locale: locale.months["stand-alone"]["wide"], MONTHS, 1)


def weekday_word(code: str, weekday: str) -> str | None:
    """Return an English weekday in the official language."""
    return _word(code, weekday, lambda locale: locale.days["stand-alone"]["wide"], WEEKDAYS, 0)


def _word(code: str, english: str, words: Any, order: Sequence[str], first: int) -> str | None:
    locale = _foreign_locale(code)
    return clean(words(locale)[order.index(english) + first]) if locale else None


def language_word(code: str, english: str) -> str | None:
    """Return the name of a foreign language in the official one."""
    locale = _foreign_locale(code)
    if locale is None or locale.language == LANGUAGES[english]:
        return None
    return clean(locale.languages[LANGUAGES[english]])


def span_words(code: str, english: str) -> str | None:
    """Return a span of time such as "in three days" in the official language."""
    locale = _foreign_locale(code)
    if locale is None:
        return None
    unit, span = SPANS[english]
    style = {"granularity": unit, "threshold": 2, "add_direction": True, "locale": locale}
    return clean(importlib.import_module("babel.dates").format_timedelta(span, **style))


def written_date(code: str, english: str) -> str | None:
    """Return a date such as "5 March" of ``YEAR`` in full in the official language."""
    return _date(_foreign_locale(code) and _format_locale(code), english, "long")


def numeric_date(code: str, english: str) -> str | None:
    """Return a date such as "5 March" of ``YEAR`` in figures."""
    return _date(_format_locale(code), english, "short")


def _date(locale: Any, english: str, style: str) -> str | None:
    if locale is None:
        return None
    return clean(
        importlib.import_module("babel.dates").format_date(parse_day(english), style, locale=locale)
    )


def first_weekday(code: str, _: str = "") -> str | None:
    """Return the day on which calendars begin the week."""
    locale = _find_locale(code)
    return WEEKDAYS[locale.first_week_day] if locale else None
