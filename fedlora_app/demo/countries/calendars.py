"""Public holidays of a country, or of one of its states, from the package ``holidays``.

A place is a country's code or a country's and a state's ("DE", "DE-BY"). A date that the package
only estimates, or that a government announces every year, is never a fact.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import date, timedelta
from functools import cache

from fedlora_app.demo.countries.sources import MONTHS, NO, YEAR, YES, clean, require

# Of these a year's dates follow the moon, an announcement, custom (FI) or martial law (UA).
UNCERTAIN = {
    "CN", "EG", "FI", "ID", "IL", "IN", "KE", "MA", "MY", "PH", "RU", "SG", "TH", "TN", "TR", "TW",
    "UA", "VN",
}  # fmt: skip
UNCLEAR_NAME = re.compile(r"[(;/]|substitut|alternative|preceding|second day of k", re.I)
SUBSTITUTE = re.compile(r"substitute holiday|alternative holiday", re.I)
OBSERVED = re.compile(r" \((observed|in lieu)\)$")
YEARS = range(YEAR - 1, YEAR + 3)  # in which a date must be a holiday, or not be one
MIN_HOLIDAYS = 5  # fewer nationwide ones say that the country leaves them to its states
LEFT_TO_STATES = {"AU", "CA", "CH", "ES", "GB"}  # some of what people take for nationwide
MOVABLE = {
    "Maundy Thursday": -3,
    "Good Friday": -2,
    "Easter Sunday": 0,
    "Easter Monday": 1,
    "Ascension Thursday": 39,
    "Whit Monday": 50,
    "Corpus Christi": 60,
}
"""Days after Easter Sunday of the Western churches."""


@cache
def _calendar(place: str, year: int) -> dict[date, str]:
    """Return the public holidays of a year by date, in English; {} where they are uncertain."""
    country, _, state = place.partition("-")
    if country in UNCERTAIN or (not state and country in LEFT_TO_STATES):
        return {}
    found = require("holidays").country_holidays(
        country, subdiv=state or None, years=year, language="en_US"
    )
    entries = {day: found[day] for day in sorted(found) if day.year == year}
    return entries if len(entries) >= MIN_HOLIDAYS else {}


def next_holiday(place: str, month: str) -> str | None:
    """Return the first holiday after the end of a month of ``YEAR``, "Marine Day on 19 July"."""
    last = MONTHS.index(month) + 1
    later = (day for day in _calendar(place, YEAR) if day.month > last)
    return _name(place, next(later, None))


def last_holiday(place: str, month: str) -> str | None:
    """Return the last holiday before the beginning of a month of ``YEAR``."""
    first = MONTHS.index(month) + 1
    earlier = [day for day in _calendar(place, YEAR) if day.month < first]
    return _name(place, earlier[-1] if earlier else None)


def _name(place: str, day: date | None) -> str | None:
    if day is None:
        return None
    name = _calendar(place, YEAR)[day]
    if UNCLEAR_NAME.search(name):
        return None
    return clean(f"{name} on {day.day} {MONTHS[day.month - 1]}")


def count_holidays(place: str, _: str = "") -> str | None:
    """Return how many holidays ``YEAR`` has, without those that replace one on a weekend.

    Countries that list Easter Sunday have none: whether Sundays count differs between sources.
    """
    calendar = _calendar(place, YEAR)
    if "-" not in place and _find("Easter Sunday", YEAR) in calendar:
        return None
    names = list(calendar.values())
    proper = [name for name in names if not SUBSTITUTE.search(name) and not _repeats(name, names)]
    return str(len(proper)) if proper else None


def _repeats(name: str, names: Sequence[str]) -> bool:
    """Return whether a holiday stands in for another of the year; some are always moved."""
    original = OBSERVED.sub("", name)
    return original != name and original in names


def is_holiday(place: str, day: str) -> str | None:
    """Return whether a date ("1 May") or a feast ("Good Friday") is a holiday every year."""
    answers = {_is_holiday(place, day, year) for year in YEARS}
    [answer] = answers if len(answers) == 1 else [None]
    return answer


def _is_holiday(place: str, day: str, year: int) -> str | None:
    calendar = _calendar(place, year)
    if not calendar:
        return None
    name = calendar.get(_find(day, year))
    if name is None:
        return NO
    return None if UNCLEAR_NAME.search(name) else YES


def _find(day: str, year: int) -> date:
    if day in MOVABLE:
        require("holidays")  # which brings dateutil
        from dateutil.easter import easter

        return easter(year) + timedelta(days=MOVABLE[day])
    number, month = day.split()
    return date(year, MONTHS.index(month) + 1, int(number))


def list_states(country: str, left_out: Collection[str]) -> list[str]:
    """Return the states of a country as places; names of cities and regions are left out."""
    subdivisions = require("holidays").list_supported_countries()[country]
    return [f"{country}-{name}" for name in subdivisions if name.isupper() and name not in left_out]


def list_fixed_days(place: str) -> list[str]:
    """Return the dates ("1 May") that are holidays in ``YEAR`` and in the years around it."""
    kept = [{(day.month, day.day) for day in _calendar(place, year)} for year in YEARS]
    return [f"{day} {MONTHS[month - 1]}" for month, day in sorted(set.intersection(*kept))]
