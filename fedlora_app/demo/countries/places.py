"""The countries that the benchmark knows, by ISO 3166 code.

Emergency numbers stand here because no package tells which service answers which number;
``sources`` keeps one only if ``phonenumbers`` lists it as an emergency number of that country.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Country:
    """A country's English name as it stands after "in", and its emergency numbers."""

    name: str
    ambulance: str = ""
    fire: str = ""
    police: str = ""

    @property
    def slug(self) -> str:
        """The id of a client: "united-states"."""
        return self.name.removeprefix("the ").lower().replace(" ", "-")


COUNTRIES = {
    "AR": Country("Argentina", "107", "100"),
    "AT": Country("Austria", "144", "122", "133"),
    "AU": Country("Australia", "000", "000", "000"),
    "BE": Country("Belgium", "112", "112", "112"),
    "BG": Country("Bulgaria", "112", "112", "112"),
    "BR": Country("Brazil", "192", "193", "190"),
    "CA": Country("Canada", "911", "911", "911"),
    "CH": Country("Switzerland", "144", "118", "117"),
    "CL": Country("Chile", "131", "132", "133"),
    "CN": Country("China", "120", "119", "110"),
    "CO": Country("Colombia", "123", "123", "123"),
    "CR": Country("Costa Rica", "911", "911", "911"),
    "CY": Country("Cyprus", "112", "112", "112"),
    "CZ": Country("Czechia", "155", "150", "158"),
    "DE": Country("Germany", "112", "112", "110"),
    "DK": Country("Denmark", "112", "112", "112"),
    "EE": Country("Estonia", "112", "112", "112"),
    "EG": Country("Egypt", "123", "180", "122"),
    "ES": Country("Spain", "112", "112", "112"),
    "FI": Country("Finland", "112", "112", "112"),
    "FR": Country("France", "15", "18", "17"),
    "GB": Country("the United Kingdom", "999", "999", "999"),
    "GR": Country("Greece", "166", "199", "100"),
    "HR": Country("Croatia", "194", "193", "192"),
    "HU": Country("Hungary", "104", "105", "107"),
    "IE": Country("Ireland", "112", "112", "112"),
    "IL": Country("Israel", "101", "102", "100"),
    "IN": Country("India", "112", "112", "112"),
    "IS": Country("Iceland", "112", "112", "112"),
    "IT": Country("Italy", "112", "112", "112"),
    "JP": Country("Japan", "119", "119", "110"),
    "KE": Country("Kenya", "999", "999", "999"),
    "KR": Country("South Korea", "119", "119", "112"),
    "LT": Country("Lithuania", "112", "112", "112"),
    "LU": Country("Luxembourg", "112", "112", "113"),
    "LV": Country("Latvia", "112", "112", "112"),
    "MA": Country("Morocco", "15", "15", "19"),
    "MT": Country("Malta", "112", "112", "112"),
    "MX": Country("Mexico", "911", "911", "911"),
    "MY": Country("Malaysia", "999", "999", "999"),
    "NL": Country("the Netherlands", "112", "112", "112"),
    "NO": Country("Norway", "113", "110", "112"),
    "NZ": Country("New Zealand", "111", "111", "111"),
    "PE": Country("Peru", "106", "116", "105"),
    "PH": Country("the Philippines", "911", "911", "911"),
    "PL": Country("Poland", "999", "998", "997"),
    "PT": Country("Portugal", "112", "112", "112"),
    "RO": Country("Romania", "112", "112", "112"),
    "RS": Country("Serbia", "194", "193", "192"),
    "RU": Country("Russia", "103", "101", "102"),
    "SE": Country("Sweden", "112", "112", "112"),
    "SG": Country("Singapore", "995", "995", "999"),
    "SI": Country("Slovenia", "112", "112", "113"),
    "SK": Country("Slovakia", "155", "150", "158"),
    "TH": Country("Thailand", "1669", "199", "191"),
    "TN": Country("Tunisia", "190", "198", "197"),
    "TR": Country("Turkey", "112", "112", "112"),
    "TW": Country("Taiwan", "119", "119", "110"),
    "UA": Country("Ukraine", "103", "101", "102"),
    "US": Country("the United States", "911", "911", "911"),
    "UY": Country("Uruguay", police="911"),
    "VN": Country("Vietnam", "115", "114", "113"),
    "ZA": Country("South Africa", "10177", "10177", "10111"),
}
