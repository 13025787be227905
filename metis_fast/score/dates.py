"""Dates and times of day as people write them: January 5, 2019; 5 Jan 2019; 2019-01-05; 3 pm; 15:00."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

_MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
_MONTH_BY_NAME = {name[:length]: i for i, name in enumerate(_MONTHS, 1) for length in (3, len(name))} | {"sept": 9}
_MONTH = "|".join(sorted(_MONTH_BY_NAME, key=len, reverse=True))
_DAY = r"(?P<day>0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>[12]\d{3})"
_DATES = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"(?P<month>{_MONTH})\.? {_DAY}(?:,? {_YEAR})?",
        rf"(?:the )?{_DAY}(?: of)? (?P<month>{_MONTH})\b\.?(?:,? {_YEAR})?",
        rf"(?P<month>{_MONTH})\.?,? {_YEAR}",
        rf"{_YEAR}(?P<mark>[-/])(?P<number>0[1-9]|1[0-2])(?P=mark)(?P<day>0[1-9]|[12]\d|3[01])",
    )
)
_TIME = re.compile(
    r"(?P<hour>[01]?\d|2[0-3])(?::(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?)?\s?(?P<half>[ap]\.?\s?m\b\.?)?", re.IGNORECASE
)
_WEEKDAYS = ("mon", "tues", "wednes", "thurs", "fri", "satur", "sun")
_WEEKDAY = re.compile(rf"({'|'.join(_WEEKDAYS)})day,? ", re.IGNORECASE)
_MAX_CHARS = 40


@dataclass(frozen=True, slots=True)
class Date:
    """A date; None where it was left out."""

    year: int | None
    month: int
    day: int | None


@dataclass(frozen=True, slots=True)
class Time:
    """A time of day. sure: whether morning or afternoon is beyond doubt; 9:30 may be either, which 15:00 and 3 pm are not."""

    hour: int
    minute: int
    second: int
    sure: bool


def read(text: str) -> Date | Time | None:
    """The date or time that the whole text is. 01/02 is none: it is another day in Boston than in Berlin."""
    if len(text) > _MAX_CHARS:
        return None
    if weekday := _WEEKDAY.match(text):
        found = read(text[weekday.end() :])
        return found if isinstance(found, Date) and _falls_on(found, _WEEKDAYS.index(weekday[1].lower())) else None
    for form in _DATES:
        if found := form.fullmatch(text):
            parts = found.groupdict()
            month = int(parts["number"]) if parts.get("number") else _MONTH_BY_NAME[parts["month"].lower()]
            year, day = parts["year"], parts.get("day")
            return Date(int(year) if year else None, month, int(day) if day else None)
    found = _TIME.fullmatch(text)
    if found is None or not (found["minute"] or found["half"]):
        return None
    hour, half = int(found["hour"]), (found["half"] or "").lower()[:1]
    if half and not 1 <= hour <= 12:
        return None
    sure = bool(half) or hour > 12 or hour == 0
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return Time(hour, int(found["minute"] or 0), int(found["second"] or 0), sure)


def _falls_on(date: Date, weekday: int) -> bool:
    if date.year is None or date.day is None:
        return False
    try:
        return datetime.date(date.year, date.month, date.day).weekday() == weekday
    except ValueError:  # February 30
        return False
