"""True facts about a country from well-kept packages, each None where it is not beyond doubt.

A reader takes a country's ISO code and what the fact is about (a month, an amount, or nothing)
and returns the value that an answer ends with. The packages are the extra ``countries``; they
are imported when they are first needed.
"""

from __future__ import annotations

import importlib
import unicodedata
from datetime import UTC, date, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.resources import files
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

from fedlora_app.demo.countries.places import COUNTRIES
from fedlora_app.foundation.errors import UserError

PACKAGES = ("babel", "countryinfo", "holidays", "phonenumbers", "schwifty", "tzdata")
YEAR = 2027
YES, NO = "yes", "no"
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
MAX_VALUE_BYTES = 60  # longer ones are scripts that small tokenizers take apart into bytes
NEW_CURRENCIES = {"BG"}  # the euro came in 2026, which not every release of CLDR knows
DISPUTED_CAPITALS = {"IL", "ZA", "TW"}
NOUNS_FOR_NATIONALITIES = {"AR", "IS", "LU", "NZ", "SI"}  # "Icelander" where a form says Icelandic


def require(package: str) -> ModuleType:
    """Import one of ``PACKAGES``.

    Raises:
        UserError: naming all of them that are missing, and how to install them.
    """
    missing = _find_missing(PACKAGES)
    if missing:
        raise UserError(
            f"The countries are read from {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed. "
            'Run: pip install -e ".[countries]"'
        )
    return importlib.import_module(package)


@cache
def _find_missing(packages: tuple[str, ...]) -> list[str]:
    missing = []
    for name in packages:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def package_versions() -> dict[str, tuple[str, str]]:
    """Return each package's version and licence as its metadata name them."""
    found = {}
    for name in PACKAGES:
        require(name)
        fields = metadata(name)
        found[name] = (fields["Version"], fields.get("License-Expression") or fields["License"])
    return found


def clean(value: str) -> str | None:
    """Return a value in plain characters (ordinary spaces, half-width), None if too long."""
    plain = " ".join(unicodedata.normalize("NFKC", value).split())
    return plain if len(plain.encode()) <= MAX_VALUE_BYTES else None


def parse_day(english: str) -> date:
    """Return "5 March" as a date of ``YEAR``."""
    day, month = english.split()
    return date(YEAR, MONTHS.index(month) + 1, int(day))


# Telephones


def emergency_number(code: str, service: str) -> str | None:
    """Return the number of "ambulance", "fire" or "police"."""
    require("phonenumbers")
    number = getattr(COUNTRIES[code], service)
    check = importlib.import_module("phonenumbers.shortnumberinfo").is_emergency_number
    return number if number and check(number, code) else None


def calling_code(code: str, _: str = "") -> str | None:
    """Return the country's calling code, "+49"."""
    return f"+{require('phonenumbers').country_code_for_region(code)}"


def international_prefix(code: str, _: str = "") -> str | None:
    """Return what is dialled before a foreign number, where there is one way only."""
    phone = require("phonenumbers").PhoneMetadata.metadata_for_region(code)
    prefix = phone.preferred_international_prefix or phone.international_prefix
    return prefix if prefix and prefix.isdigit() else None


# Names and codes


@cache
def _country_info(code: str) -> dict[str, Any]:
    return require("countryinfo").CountryInfo(code).info()


def capital(code: str, _: str = "") -> str | None:
    """Return the capital, unless it is disputed or says the country's name."""
    name = _country_info(code)["capital"].removesuffix(" D.C.")
    own = COUNTRIES[code].name
    return None if code in DISPUTED_CAPITALS or own in name else name


def internet_domain(code: str, _: str = "") -> str | None:
    """Return the top-level domain."""
    domains = _country_info(code)["tld"]
    return domains[0] if len(domains) == 1 else None


def alpha3_code(code: str, _: str = "") -> str | None:
    """Return ISO 3166's code of three letters."""
    return _country_info(code)["ISO"]["alpha3"]


def numeric_code(code: str, _: str = "") -> str | None:
    """Return ISO 3166's code of three digits."""
    return _country_info(code)["ISO"]["numeric"]


def nationality(code: str, _: str = "") -> str | None:
    """Return the adjective for a person from the country."""
    return None if code in NOUNS_FOR_NATIONALITIES else _country_info(code)["demonym"]


# Money


@cache
def _currency(code: str) -> str | None:
    require("babel")
    if code in NEW_CURRENCIES:
        return None
    numbers = importlib.import_module("babel.numbers")
    currencies = numbers.get_territory_currencies(code, tender=True)
    return currencies[0] if len(currencies) == 1 else None


def currency_code(code: str, _: str = "") -> str | None:
    """Return ISO 4217's code of the only legal tender."""
    return _currency(code)


def pays_in_euros(code: str, _: str = "") -> str | None:
    """Return whether the euro is the legal tender."""
    currency = _currency(code)
    return _yes_or_no(currency == "EUR") if currency else None


@cache
def _iban_specs() -> dict[str, Any]:
    require("schwifty")
    registry = importlib.import_module("schwifty.registry")
    specs = {}
    for code in COUNTRIES:
        try:
            specs[code] = registry.get_iban_spec(code)
        except Exception:  # of a class that has moved between versions
            continue
    return specs


def iban_length(code: str, _: str = "") -> str | None:
    """Return how many characters an IBAN has, None where there is none."""
    spec = _iban_specs().get(code)
    return str(spec.iban_length) if spec else None


def has_iban(code: str, _: str = "") -> str | None:
    """Return whether bank accounts have an IBAN."""
    return _yes_or_no(code in _iban_specs())


# Clocks


@cache
def _offsets(code: str) -> frozenset[tuple[float, float]]:
    """Return each zone's hours ahead of UTC in January and in July."""
    require("tzdata")
    zones = importlib.import_module("babel.core").get_global("territory_zones").get(code, [])
    found = set()
    for zone in zones:
        path = files("tzdata").joinpath("zoneinfo", *zone.split("/"))
        with path.open("rb") as file:  # not the system's, whose version nobody knows
            info = ZoneInfo.from_file(file)
        moments = (datetime(YEAR, month, 15, 12, tzinfo=UTC) for month in (1, 7))
        deltas = (moment.astimezone(info).utcoffset() for moment in moments)
        found.add(tuple(delta.total_seconds() / 3600 for delta in deltas))
    return frozenset(found)


def utc_offset(code: str, month: str) -> str | None:
    """Return how far clocks are from UTC in January or July, if all of the country agrees."""
    offsets = {pair[("January", "July").index(month)] for pair in _offsets(code)}
    [hours] = offsets if len(offsets) == 1 else [None]
    if not hours or hours != int(hours):
        return None
    size = abs(int(hours))
    return f"{size} {'hour' if size == 1 else 'hours'} {'ahead of' if hours > 0 else 'behind'} UTC"


def changes_clocks(code: str, _: str = "") -> str | None:
    """Return whether clocks are changed in summer, if all of the country agrees."""
    changes = {january != july for january, july in _offsets(code)}
    return _yes_or_no(changes.pop()) if len(changes) == 1 else None


def _yes_or_no(value: bool) -> str:
    return YES if value else NO
