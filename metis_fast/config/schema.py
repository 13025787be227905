"""The JSON schema of a config file, for editors and other programs."""

from __future__ import annotations

import sys
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from metis_fast.config.tree import Config

_BASE = {
    "type": "string",
    "format": "path",
    "description": "Another config, as seen from this file; what stands here goes before it.",
}


class _Generator(GenerateJsonSchema):
    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """JSON has no infinity. What refuses it has the largest float as its limit, which YAML's `.inf` is beyond."""
        bound = {} if schema.get("allow_inf_nan", True) else {"maximum": sys.float_info.max}
        return bound | super().float_schema(schema)


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file, whose keys are all optional.

    It knows one spelling of each value, the one of `to_yaml`; `load` reads others, too (`1_000`, one value for a list of one).
    """
    raw = Config.model_json_schema(schema_generator=_Generator)
    tree = _written_out(raw, raw["$defs"], Config().model_dump(mode="json"))
    properties = {"base": _BASE} | tree["properties"]
    return {"$schema": _Generator.schema_dialect, "title": "Config of metis-fast"} | tree | {"properties": properties}


def _written_out(node: dict[str, Any], defs: dict[str, Any], default: Any) -> dict[str, Any]:
    """A node without references: one class may stand in two places, with other defaults (`train.optim`, `sft.optim`)."""
    if "$ref" in node:
        node = defs[node["$ref"].rpartition("/")[2]]
    out = {key: value for key, value in node.items() if key not in ("title", "$defs")}
    if "description" in out:
        out["description"] = " ".join(out["description"].split())
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = _written_out(out[key], defs, None)
    for key in ("anyOf", "prefixItems"):
        if key in out:
            out[key] = [_written_out(part, defs, None) for part in out[key]]
    if "properties" in out:
        given = default if isinstance(default, dict) else {}
        out["properties"] = {
            name: _written_out(part, defs, given.get(name, part.get("default"))) for name, part in out["properties"].items()
        }
    elif "default" in out:
        out["default"] = default
    return out
