"""Arguments of a call against the JSON schema of its tool, and what the agent has to write instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema import SchemaError
from jsonschema.exceptions import best_match
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from metis_fast.errors import InfrastructureError, one_line
from metis_fast.tools.protocol import ToolSpec
from metis_fast.tools.results import Refusal, Refused

MAX_DEPTH = 64
"""Of lists and objects in the arguments of a call. What is nested deeper is the agent's mistake: no tool takes it, and on its
way to some it could not even be written."""
_LONGEST = 300  # characters of what is wrong; the value itself may be huge
_EXAMPLES: dict[str, object] = {
    "string": "...",
    "integer": 1,
    "number": 1.5,
    "boolean": True,
    "array": [],
    "object": {},
    "null": None,
}


class Arguments:
    """Checks the arguments of one tool. Its schema has passed `schema_problem`."""

    def __init__(self, spec: ToolSpec) -> None:
        self._name = spec.name
        # an empty registry: a schema that refers to an address is never fetched
        self._validator: Validator = validator_for(dict(spec.schema), Draft202012Validator)(spec.schema, registry=Registry())
        self._expected = _expected(spec)

    def problem(self, arguments: Mapping[str, object]) -> str:
        """What the agent reads of arguments that do not fit; empty where they do.

        Raises:
            InfrastructureError: the schema refers to something that is not in it.
        """
        try:
            given: Any = dict(arguments)
            error = best_match(self._validator.iter_errors(given))
        except Unresolvable as unresolved:
            raise InfrastructureError(
                f"tool {self._name}: its schema refers to what is not there: {one_line(unresolved)[:_LONGEST]}"
            ) from None
        except RecursionError:
            return f"{self._name} {self._expected}: the arguments are nested too deeply."
        if error is None:
            return ""
        if not self._expected.startswith("expects {"):  # it says all
            return f"{self._name} {self._expected}."
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error.absolute_path).lstrip(".")
        wrong = f"{place[:100]}: {_message(error)}" if place else _message(error)
        return f"{self._name} {self._expected}: {wrong}."


def too_deep(name: str, arguments: Mapping[str, object]) -> Refused | None:
    """The refusal of arguments that are nested too deep; None: they are not. Wherever tools run, the limit is the same."""
    if not _is_deep(dict(arguments), MAX_DEPTH):
        return None
    return Refused(f"The arguments are nested deeper than {MAX_DEPTH} levels.", Refusal.ARGUMENTS, name)


def _is_deep(value: object, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return depth == 0 or any(_is_deep(one, depth - 1) for one in (value.values() if isinstance(value, dict) else value))


def schema_problem(schema: object) -> str:
    """What is wrong with the schema of a tool's arguments; empty where nothing is."""
    if not isinstance(schema, Mapping):
        return f"got {type(schema).__name__}"
    if schema.get("type") != "object":
        return f'"type" is {schema.get("type")!r:.50}'
    try:
        json.dumps(dict(schema), allow_nan=False)
        validator_for(dict(schema), Draft202012Validator).check_schema(dict(schema))
    except SchemaError as error:
        return one_line(error.message)[:_LONGEST]
    except (TypeError, ValueError, RecursionError) as error:
        return f"it is no JSON ({one_line(error)[:_LONGEST]})"
    return ""


def example(spec: ToolSpec) -> dict[str, object]:
    """Arguments of the right kinds."""
    return {name: _example(entry) for name, entry in _properties(spec).items()}


def _properties(spec: ToolSpec) -> dict[str, Mapping[str, Any]]:
    properties: Any = spec.schema.get("properties") or {}
    return {name: entry for name, entry in properties.items() if isinstance(entry, Mapping)}  # the others are True or False


def _expected(spec: ToolSpec) -> str:
    kinds = _properties(spec)
    closed = spec.schema.get("additionalProperties") is False
    if not kinds and closed:
        return "takes no arguments: {}"
    required: Any = spec.schema.get("required") or []
    shown = json.dumps(example(spec), ensure_ascii=False)[:1000]
    if closed and len(kinds) == 1 and list(kinds) == list(required) and next(iter(kinds.values())).get("type") == "string":
        return f"expects one argument, a string: {shown}"
    optional = [name for name in kinds if name not in required]
    may = f" ({', '.join(optional)} may be left out)"[:_LONGEST] if optional else ""
    return f"expects {shown}{may}"


def _example(entry: Mapping[str, Any]) -> object:
    for key in ("const", "default"):
        if key in entry:
            return entry[key]
    choices = entry.get("enum") or entry.get("examples")
    if isinstance(choices, list) and choices:
        return choices[0]
    kind = entry.get("type")
    if isinstance(kind, list) and kind:
        kind = kind[0]
    return _EXAMPLES.get(kind, "...") if isinstance(kind, str) else "..."


def _message(error: Any) -> str:
    """jsonschema's, with what the agent wrote shortened: it stands in front, as Python would print it."""
    message = one_line(error.message)
    return message if len(message) <= _LONGEST else f"{message[:100]} ... {message[-150:]}"
