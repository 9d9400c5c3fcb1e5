"""What can be asked about a country or a state: kinds of fact, each with its reader and wording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedlora_app.demo.countries import (
    calendars,
    holiday_wordings,
    language_wordings,
    locales,
    sources,
)
from fedlora_app.demo.countries import wordings as w
from fedlora_app.demo.countries.locales import LANGUAGES, SPANS
from fedlora_app.demo.countries.places import COUNTRIES
from fedlora_app.demo.countries.sources import MONTHS, NO, WEEKDAYS
from fedlora_app.demo.countries.wordings import Wording

Reader = Callable[[str, str], str | None]

DAYS = (
    "2 January", "6 January", "11 February", "23 February", "8 March", "21 April", "25 April",
    "29 April", "1 May", "3 May", "5 May", "8 May", "2 June", "24 June", "14 July", "21 July",
    "1 August", "11 August", "15 August", "7 September", "15 September", "3 October",
    "12 October", "28 October", "31 October", "1 November", "2 November", "3 November",
    "11 November", "15 November", "20 November", "23 November", "6 December", "8 December",
    "24 December", "25 December", "26 December",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of fact; ``items`` are what its facts are about, "" where it has a single one."""

    name: str
    read: Reader
    wording: Wording
    items: tuple[str, ...] = ("",)
    noun: str = "country"
    """What a question about the own place calls it."""

    @property
    def is_yes_no(self) -> bool:
        """Whether it is answered by yes or no."""
        return bool(self.wording.negative)

    def ask(self, item: str, wording: int, country: str = "") -> str:
        """Return the question in one of the wordings; without a country it is about the own one."""
        return _fill(self.wording.questions[wording], country, self.noun, item)

    def reply(self, item: str, value: str, country: str = "") -> str:
        """Return the full sentence that answers with ``value``."""
        form = self.wording.negative if value == NO and self.is_yes_no else self.wording.answer
        return _fill(form, country, self.noun, item, value)


def _fill(template: str, country: str, noun: str, item: str, value: str = "") -> str:
    name = COUNTRIES[country].name if country else ""
    words = {
        "in_": f" in {name}" if name else "",
        "here": f" in {name}" if name else " here",
        "here_from": f" from {name}" if name else " from here",
        "ours": f" in {name}" if name else f" in our {noun}",
        "of": f" of {name}" if name else f" of our {noun}",
        "country": name or f"our {noun}",
        "lead": f"In {name}, " if name else "",
        "public": "public" if noun == "state" else "nationwide public",
    }
    sentence = template.format(item=item, value=value, **words)
    sentence = sentence.removesuffix(".") if sentence.endswith("..") else sentence
    return sentence[0].upper() + sentence[1:]


def _service(name: str) -> Reader:
    return lambda code, _: sources.emergency_number(code, name)


HOLIDAY_KINDS = (
    Kind("next holiday", calendars.next_holiday, holiday_wordings.NEXT_HOLIDAY, MONTHS[:-1]),
    Kind("last holiday", calendars.last_holiday, holiday_wordings.LAST_HOLIDAY, MONTHS[1:]),
    Kind("number of holidays", calendars.count_holidays, holiday_wordings.COUNT_HOLIDAYS),
    Kind(
        "is a holiday",
        calendars.is_holiday,
        holiday_wordings.IS_HOLIDAY,
        (*DAYS, *calendars.MOVABLE),
    ),
)
COUNTRY_KINDS = (
    Kind("ambulance", _service("ambulance"), w.AMBULANCE),
    Kind("fire brigade", _service("fire"), w.FIRE),
    Kind("police", _service("police"), w.POLICE),
    Kind("calling code", sources.calling_code, w.CALLING_CODE),
    Kind("international prefix", sources.international_prefix, w.INTERNATIONAL_PREFIX),
    Kind("capital", sources.capital, w.CAPITAL),
    Kind("internet domain", sources.internet_domain, w.DOMAIN),
    Kind("three-letter code", sources.alpha3_code, w.ALPHA3),
    Kind("numeric code", sources.numeric_code, w.NUMERIC),
    Kind("nationality", sources.nationality, w.NATIONALITY),
    Kind("currency code", sources.currency_code, w.CURRENCY),
    Kind("euro", sources.pays_in_euros, w.EUROS),
    Kind("IBAN length", sources.iban_length, w.IBAN_LENGTH),
    Kind("has IBAN", sources.has_iban, w.HAS_IBAN),
    Kind("language", locales.language, language_wordings.LANGUAGE),
    Kind("own name of the language", locales.language_itself, language_wordings.LANGUAGE_ITSELF),
    Kind("month", locales.month_word, language_wordings.MONTH, MONTHS),
    Kind("weekday", locales.weekday_word, language_wordings.WEEKDAY, WEEKDAYS),
    Kind(
        "foreign language",
        locales.language_word,
        language_wordings.FOREIGN_LANGUAGE,
        tuple(LANGUAGES),
    ),
    Kind("span of time", locales.span_words, language_wordings.SPAN, tuple(SPANS)),
    Kind(
        "date in full",
        locales.written_date,
        language_wordings.WRITTEN_DATE,
        ("5 March", "21 May", "9 October"),
    ),
    Kind(
        "date in figures",
        locales.numeric_date,
        language_wordings.NUMERIC_DATE,
        ("25 November", "14 October"),
    ),
    Kind("first weekday", locales.first_weekday, language_wordings.FIRST_WEEKDAY),
    Kind("offset from UTC", sources.utc_offset, language_wordings.UTC_OFFSET, ("January", "July")),
    Kind("summer time", sources.changes_clocks, language_wordings.CLOCKS),
    *HOLIDAY_KINDS,
)
