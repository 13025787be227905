"""What the sections share: their base class, and types that read a setting as whoever wrote it meant it.

YAML would guess what `on`, `007`, `2026-11-29` or `1e3` are. Here a file's plain scalars, and what stands after the `=` on a
command line, arrive as `Plain` text, and the type of the setting says what it means.
"""

from __future__ import annotations

import math
import os
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    PlainSerializer,
    SerializationInfo,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

T = TypeVar("T")


class Section(BaseModel):
    """Base of the sections: frozen, without unknown keys; the docstrings of its attributes are the meaning of its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class MayChange:
    """Marks a setting or a section that decides no result: a run may go on with another value. What it does change is speed,
    memory, rounding, or how long something is waited for.
    """

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """In the schema of a config file, too."""
        node = handler(schema)
        return node if "$ref" in node else node | {"x-may-change": True}


MAY_CHANGE = MayChange()


class ByContent:
    """Marks a setting that names files which decide a result: they may lie elsewhere when a run goes on, but hold the same."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """In the schema of a config file, too."""
        return handler(schema) | {"x-by-content": True}


BY_CONTENT = ByContent()


class Plain(str):
    """Text that was written without quotes; `null` and commas mean something in it."""

    __slots__ = ()


def is_nothing(value: object) -> bool:
    """Whether a value was left out, or is YAML's null."""
    return value is None or (isinstance(value, Plain) and value in ("", "~", "null", "Null", "NULL"))


# -- numbers --------------------------------------------------------------------------------------------------------------


def _number(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", text.lower()))  # YAML's spelling
    except ValueError:
        pass
    if re.fullmatch(r"[+-]?\d*\.?\d+%", text):
        raise ValueError(f"expected a number; write {float(text[:-1]) / 100:g} for {text}")
    return _without_comma(value)


def _without_comma(text: str) -> str:
    if re.fullmatch(r"\s*[+-]?\d+(,\d+)+(\.\d+)?\s*", text):
        raise ValueError("expected a number without a comma; write 0.2 for two tenths, 1000 for a thousand")
    return text


def _whole(value: object) -> object:
    """1_000, 1e3 and 1000.0 are whole numbers, too."""
    if not isinstance(value, str):
        return value
    try:
        number = Decimal(value.strip())
    except InvalidOperation:
        return _without_comma(value)
    if number.is_finite() and number.adjusted() < 19 and number == number.to_integral_value():
        return int(number)
    return value


# they come last: a bound behind one would be checked, but be missing from the schema
Number = BeforeValidator(_number)
Whole = BeforeValidator(_whole)
Int = Annotated[int, Whole]
Positive = Annotated[int, Field(gt=0), Whole]
NonNegative = Annotated[int, Field(ge=0), Whole]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), Number]


# -- text and paths -------------------------------------------------------------------------------------------------------


def _text(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value and is_nothing(value):
        raise ValueError(f"expected text; leave the key out for its default, or write '{value}' in quotes")
    return _one_line(value)


def _one_line(text: str) -> str:
    if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", text):
        raise ValueError("expected one line without control characters")
    return str(text)


def _variable(match: re.Match[str]) -> str:
    name = match[2] or match[3]
    if match[1]:
        return "$"
    if name is None:
        raise ValueError("expected $NAME or ${NAME} for an environment variable, $$ for a dollar sign")
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set; set it, or write $$ for a dollar sign")
    return os.environ[name]


def expand(text: str) -> Path:
    """A path with its `~` and environment variables filled in.

    Raises:
        ValueError: there is none, or one of them is unknown.
    """
    if not _one_line(text):
        raise ValueError("expected a path")
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise ValueError(f"no user has this home folder; write ./{text} for a name that begins with ~")
    return Path(re.sub(r"\$(?:(\$)|(\w+)|\{(\w+)\})?", _variable, home))


def _path(value: object) -> object:
    value = _text(value)
    return expand(value) if isinstance(value, str) else value


def _write_path(path: Path, info: SerializationInfo) -> str:
    """As it stands for programs; so that `expand` gives it back for a file (`to_yaml`)."""
    if not info.context:
        return str(path)
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


Text = Annotated[str, BeforeValidator(_text)]
FilePath = Annotated[Path, BeforeValidator(_path), PlainSerializer(_write_path, when_used="json")]


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

_WORDS = {
    spelt: word in ("true", "yes", "on")
    for word in ("true", "yes", "on", "false", "no", "off")
    for spelt in (word, word.capitalize(), word.upper())
}
NUMERIC = re.compile(r"[-+]?(\.?[0-9][0-9_.]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF|nan|NaN|NAN))\Z")
"""Plain text that may be a number; as text it has to be quoted."""


def _guess(value: object) -> object:
    """What plain text means where no type says it: as in YAML, and 1e-3 is a number."""
    if is_nothing(value) or isinstance(value, (list, dict)):
        raise ValueError("expected a number, true, false or text")
    if not isinstance(value, Plain):
        return value
    if value in _WORDS:
        return _WORDS[value]
    if NUMERIC.match(value):
        try:
            return int(value)
        except ValueError:
            number = _number(value)
            return number if isinstance(number, float) else str(value)
    return _one_line(value)


Free = Annotated[str | int | float | bool, BeforeValidator(_guess)]
Named = BeforeValidator(lambda value: {} if is_nothing(value) else value)


def _json(value: object) -> object:
    """As `_guess`, in lists and mappings too; JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    value = None if is_nothing(value) else _guess(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected numbers that JSON has")
    return value


JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_json), Named]
