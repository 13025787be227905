"""What the sections share: their base class, and types that read a setting as whoever wrote it meant it.

YAML would guess what `on`, `007`, `2026-11-29` or `1e3` are. Here a file's plain scalars, and what stands after the `=` on a
command line, arrive as `Plain` text, and the type of the setting says what it means.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, SerializationInfo

T = TypeVar("T")


class Section(BaseModel):
    """Base of the sections: frozen, without unknown keys; the docstrings of its attributes are the meaning of its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Plain(str):
    """Text that was written without quotes; `null` and commas mean something in it."""

    __slots__ = ()


def is_nothing(value: object) -> bool:
    """Whether a value was left out, or is YAML's null."""
    return value is None or (isinstance(value, Plain) and value.lower() in ("", "~", "null"))


# -- numbers --------------------------------------------------------------------------------------------------------------


def _number(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", text.lower()))  # YAML's spelling
    except ValueError:
        pass
    if re.fullmatch(r"[+-]?[\d.]*\d%", text) and text.count(".") < 2:
        raise ValueError(f"expected a number, for example {float(text[:-1]) / 100:g} for {text}")
    if re.fullmatch(r"[+-]?\d+(,\d+)+(\.\d+)?", text):
        raise ValueError("expected a number without a comma (0.2 for two tenths, 1000 for a thousand)")
    return value


def _whole(value: object) -> object:
    """1_000, 1e3 and 1000.0 are whole numbers, too."""
    if not isinstance(value, str):
        return value
    try:
        number = Decimal(value.strip())
    except InvalidOperation:
        return _number(value)
    if number.is_finite() and number.adjusted() < 19 and number == number.to_integral_value():
        return int(number)
    return value


Number = BeforeValidator(_number)
Whole = BeforeValidator(_whole)
Int = Annotated[int, Whole]
Positive = Annotated[int, Whole, Field(gt=0)]
NonNegative = Annotated[int, Whole, Field(ge=0)]
PositiveFloat = Annotated[float, Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Number, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Number, Field(ge=0, le=1, allow_inf_nan=False)]


# -- text and paths -------------------------------------------------------------------------------------------------------


def _text(value: object) -> object:
    if not isinstance(value, str):
        return value
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ValueError("expected one line without control characters")
    return str(value)


def _variable(match: re.Match[str]) -> str:
    name = match[2] or match[3]
    if match[1]:
        return "$"
    if name is None:
        raise ValueError("expected $NAME or ${NAME} for an environment variable, $$ for a dollar sign")
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set; set it, or write $$ for a dollar sign")
    return os.environ[name]


def expand(value: object) -> object:
    """`~` and environment variables in a path that is still text."""
    value = _text(value)
    if not isinstance(value, str):
        return value
    if not value:
        raise ValueError("expected a path, got nothing")
    home = os.path.expanduser(value)
    if home.startswith("~"):
        raise ValueError(f"no user has the home folder that is named; write ./{value} for a name that begins with ~")
    return Path(re.sub(r"\$(?:(\$)|(\w+)|\{(\w+)\})?", _variable, home))


def _write_path(path: Path, info: SerializationInfo) -> str:
    """As it stands for programs; so that `expand` gives it back for a file (`to_yaml`)."""
    if not info.context:
        return str(path)
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


Text = Annotated[str, BeforeValidator(_text)]
FilePath = Annotated[Path, BeforeValidator(expand), PlainSerializer(_write_path, when_used="json")]


# -- what may be left out, and lists --------------------------------------------------------------------------------------


def _listed(value: object) -> object:
    """One value is a list of one; commas separate several where no quotes keep them."""
    if isinstance(value, Plain) and value:
        return [] if is_nothing(value) else [Plain(part.strip()) for part in value.split(",")]
    return [value] if isinstance(value, (str, dict)) and value else value


Nullable = BeforeValidator(lambda value: None if is_nothing(value) else value)
Listed = BeforeValidator(_listed)
OrNone = Annotated[T | None, Nullable]
Several = Annotated[tuple[T, ...], Listed]


# -- settings of other programs -------------------------------------------------------------------------------------------

_WORDS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


def _guess(value: object) -> object:
    """What plain text means where no type says it: as in YAML, and 1e-3 is a number."""
    if isinstance(value, (list, dict)):
        raise ValueError("expected one value: a number, true, false or text")
    if not isinstance(value, Plain):
        return value
    if is_nothing(value):
        return None
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if re.match(r"[+-]?\.?\d", value):
        for parse in (int, float):
            try:
                return parse(value)
            except ValueError:
                pass
    return str(value)


Free = Annotated[str | int | float | bool | None, BeforeValidator(_guess)]


def _keyed(value: object) -> Any:
    return {} if is_nothing(value) else value


Arguments = Annotated[dict[str, Free], BeforeValidator(_keyed)]
