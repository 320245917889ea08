"""The one way in which arguments are checked against a tool's JSON Schema."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4096)
def validator_of(schema_text: str) -> tuple[Any, str | None]:
    """(jsonschema validator, None) of a schema as JSON text, or (None, why it is no JSON Schema).

    The draft is the one that its "$schema" names (tools of MCP servers say draft-07), else 2020-12. Cached, because a
    data set repeats its tools in every row.
    """
    import jsonschema
    import referencing

    schema = json.loads(schema_text)
    kind = jsonschema.Draft202012Validator
    if isinstance(schema, dict) and isinstance(schema.get("$schema"), str):
        kind = jsonschema.validators.validator_for(schema, default=kind)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        return None, error.message[:200]
    # An empty registry: a "$ref" must not make this machine fetch addresses.
    return kind(schema, registry=referencing.Registry()), None
