"""Pydantic's types as JSON. It is imported when one of them is given, and not needed otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from ..errors import InvalidRequestError
from ._kinds import MISSING, Anything, Field, Kind, explained, grown_fields


def is_adapter(hint: Any) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(hint, pydantic.TypeAdapter)


class Pydantic(Kind):
    """Whatever pydantic has a schema for; it reads the value, too."""

    def __init__(self, hint: Any, kind_of: Callable[[Any, str], Kind]) -> None:
        """`kind_of` makes the kind of a field's type. What pydantic raises goes through."""
        import pydantic

        self._hint, self._kind_of = hint, kind_of
        self._adapter = hint if is_adapter(hint) else pydantic.TypeAdapter(hint)
        self.schema = self._adapter.json_schema()

    def read(self, value: Any, where: str = "") -> Any:
        import json

        try:
            return self._adapter.validate_json(json.dumps(value))
        except ValueError as error:
            raise explained(error, where) from None

    def begun(self, value: Any, depth: int) -> Any:
        """A model that was not validated: what is not there yet is None, if it has no default."""
        if not self._fields or not isinstance(value, dict):
            return MISSING
        known = {name: each for name, each in value.items() if name in self._fields}
        values = grown_fields(known, depth, lambda name: self._fields[name].kind)
        required = [name for name, field in self._fields.items() if field.is_required]
        return self._hint.model_construct(**dict.fromkeys(required) | values)

    @cached_property
    def _fields(self) -> dict[str, Field]:
        """Those of a model. Made when they are needed: a model may have itself in a field."""
        found = {}
        for name, field in getattr(self._hint, "model_fields", {}).items():
            try:
                kind = self._kind_of(field.annotation, name)
            except InvalidRequestError:
                kind = Anything()
            found[field.alias or name] = Field(kind, field.is_required())
        return found


def adopted(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A schema of pydantic's without its definitions, which go to the others; if one of those has
    the same name and says something else, under new names."""
    own = schema.pop("$defs", {})
    names: dict[str, str] = {}
    if any(definitions.get(name, said) != said for name, said in own.items()):
        names = {name: free_name(name, definitions) for name in own}
    references = {f"#/$defs/{name}": f"#/$defs/{new}" for name, new in names.items()}
    for name, said in own.items():
        definitions[names.get(name, name)] = _renamed(said, references)
    renamed: dict[str, Any] = _renamed(schema, references)
    return renamed


def free_name(name: str, taken: Mapping[str, Any]) -> str:
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}{number}"
    return free


def _renamed(schema: Any, references: Mapping[str, str]) -> Any:
    if isinstance(schema, dict):
        return {name: _renamed(each, references) for name, each in schema.items()}
    if isinstance(schema, list):
        return [_renamed(each, references) for each in schema]
    return references.get(schema, schema) if isinstance(schema, str) else schema
