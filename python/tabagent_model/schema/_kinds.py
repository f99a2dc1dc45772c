"""Kinds of values: their JSON, and how objects are made of it.

A kind has a JSON schema, reads a JSON value as an object of its type, and shows what there is of an
object whose JSON is still being written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ._json import Mismatch, must_be
from ._json_schema import KINDS, check, check_names, deepest, inside, one_of, same

MISSING: Any = object()
"""Of a value whose beginning shows nothing yet."""


class Kind:
    """A type as JSON."""

    schema: dict[str, Any]

    def read(self, value: Any, where: str = "") -> Any:
        """The object that a JSON value stands for; a Mismatch if it is none."""
        raise NotImplementedError

    def grow(self, value: Any, depth: int) -> Any:
        """The object as far as it has come. `depth`: how many values are unfinished: this one, the
        last one in it, and so on."""
        return self.begun(value, depth) if depth else self.read(value)

    def begun(self, value: Any, depth: int) -> Any:
        """What an unfinished value shows."""
        return MISSING


class Anything(Kind):
    """Whatever JSON can say, as it stands; or what a JSON schema allows."""

    def __init__(self, schema: dict[str, Any] | None = None) -> None:
        self.schema = schema or {}

    def read(self, value: Any, where: str = "") -> Any:
        check(value, self.schema, where)
        return value

    def begun(self, value: Any, depth: int) -> Any:
        return value


class Plain(Kind):
    """str, int, float, bool, None."""

    def __init__(self, name: str) -> None:
        self.schema = {"type": name}
        self._name = name

    def read(self, value: Any, where: str = "") -> Any:
        kind = KINDS[self._name]
        if not kind.fits(value):
            raise must_be(where, kind.words, value)
        if self._name == "integer":
            return int(value)
        return _finite(value, where) if self._name == "number" else value

    def begun(self, value: Any, depth: int) -> Any:
        return value if self._name == "string" and isinstance(value, str) else MISSING


class Written(Kind):
    """What is a string in JSON and something else in Python."""

    def __init__(self, words: str, form: str | None, make: Callable[[str], Any]) -> None:
        self.schema = {"type": "string"} | ({"format": form} if form else {})
        self._words, self._make = words, make

    def read(self, value: Any, where: str = "") -> Any:
        try:
            return self._make(value)
        except (ValueError, TypeError, AttributeError):
            raise must_be(where, self._words, value) from None


class Choice(Kind):
    """Literal, or an Enum: JSON values that stand for objects."""

    def __init__(self, objects: Sequence[tuple[Any, Any]]) -> None:
        self.objects = objects
        values = [value for value, _ in objects]
        self.schema = {"enum": values}
        if all(isinstance(value, str) for value in values):
            self.schema = {"type": "string", "enum": values}

    def read(self, value: Any, where: str = "") -> Any:
        for known, one in self.objects:
            if same(value, known):
                return one
        raise must_be(where, one_of(known for known, _ in self.objects), value)


class OneOf(Kind):
    """A union."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.schema = {"anyOf": [kind.schema for kind in kinds]}
        self._kinds = kinds

    def read(self, value: Any, where: str = "") -> Any:
        return self._first(lambda kind: kind.read(value, where))

    def begun(self, value: Any, depth: int) -> Any:
        return self._first(lambda kind: kind.begun(value, depth))

    def _first(self, read: Callable[[Kind], Any]) -> Any:
        errors = []
        for kind in self._kinds:
            try:
                found = read(kind)
            except Mismatch as error:
                errors.append(error)
            else:
                if found is not MISSING:
                    return found
        if len(errors) < len(self._kinds):
            return MISSING
        furthest = deepest(errors)
        rules = [error.rule for error in errors if error.where == furthest.where]
        if len(rules) > 1 and all(rule.startswith("must be ") for rule in rules):
            *others, last = rules
            words = [rule.partition(", got ")[0].removeprefix("must be ") for rule in others]
            furthest = Mismatch(furthest.where, f"must be {' or '.join(words)} or {last[8:]}")
        raise furthest


class Items(Kind):
    """list, set, frozenset, or a tuple of any length."""

    def __init__(self, item: Kind, make: Callable[[list[Any]], Any]) -> None:
        self.schema = {"type": "array", "items": item.schema}
        self._item, self._make = item, make

    def read(self, value: Any, where: str = "") -> Any:
        items = [self._item.read(v, f"{where}[{i}]") for i, v in enumerate(_list(value, where))]
        return self._made(items, where)

    def begun(self, value: Any, depth: int) -> Any:
        *others, last = _list(value, "") or [MISSING]
        items = [self._item.read(each) for each in others]
        if last is not MISSING and (grown := self._item.grow(last, depth - 1)) is not MISSING:
            items.append(grown)
        return self._made(items, "")

    def _made(self, items: list[Any], where: str) -> Any:
        try:
            return self._make(items)
        except TypeError as error:  # a set of what cannot be in one
            raise Mismatch(where, f"cannot be made: {error}") from None


class Fixed(Kind):
    """A tuple with a type for each place."""

    def __init__(self, items: Sequence[Kind]) -> None:
        self.schema = {
            "type": "array",
            "prefixItems": [item.schema for item in items],
            "minItems": len(items),
            "maxItems": len(items),
        }
        self._items = items

    def read(self, value: Any, where: str = "") -> Any:
        if len(_list(value, where)) != len(self._items):
            raise Mismatch(where, f"must have {len(self._items)} items, got {len(value)}")
        pairs = enumerate(zip(self._items, value, strict=True))
        return tuple(item.read(each, f"{where}[{index}]") for index, (item, each) in pairs)


class Entries(Kind):
    """A dict from strings."""

    def __init__(self, item: Kind) -> None:
        self.schema = {"type": "object"}
        if item.schema:
            self.schema["additionalProperties"] = item.schema
        self._item = item

    def read(self, value: Any, where: str = "") -> Any:
        entries = _object(value, where).items()
        return {name: self._item.read(each, inside(where, name)) for name, each in entries}

    def begun(self, value: Any, depth: int) -> Any:
        return grown_fields(_object(value, ""), depth, lambda name: self._item)


class Field(NamedTuple):
    """A field of a record, or a parameter of a function."""

    kind: Kind
    is_required: bool = True
    description: str | None = None
    default: Any = MISSING

    @property
    def schema(self) -> dict[str, Any]:
        said = {**self.kind.schema}
        if self.description:
            said["description"] = self.description
        if isinstance(self.default, (str, int, float)) and is_json(self.default):
            said["default"] = self.default
        return said


class Record(Kind):
    """What has fields: a dataclass, a TypedDict, a NamedTuple, the parameters of a function."""

    def __init__(
        self,
        fields: Mapping[str, Field],
        make: Callable[..., Any],
        *,
        description: str | None = None,
        fills_in: bool = True,
    ) -> None:
        self.schema = {
            "type": "object",
            "properties": {name: field.schema for name, field in fields.items()},
        }
        if required := [name for name, field in fields.items() if field.is_required]:
            self.schema["required"] = required
        if description:
            self.schema["description"] = description
        self._fields, self._make, self._fills_in = fields, make, fills_in

    def read(self, value: Any, where: str = "") -> Any:
        known = [name for name in self._fields if name in _object(value, where)]
        values = {
            name: self._fields[name].kind.read(value[name], inside(where, name)) for name in known
        }
        check_names(value, self._fields, where)
        for name, field in self._fields.items():
            if field.is_required and name not in value:
                raise Mismatch(inside(where, name), "is missing")
        return self._made(values, where)

    def begun(self, value: Any, depth: int) -> Any:
        """What is not there yet is None, if it has no default."""
        check_names(_object(value, ""), self._fields, "")
        values = grown_fields(value, depth, lambda name: self._fields[name].kind)
        if self._fills_in:
            required = [name for name, field in self._fields.items() if field.is_required]
            values = dict.fromkeys(required) | values
        return self._made(values, "")

    def _made(self, values: dict[str, Any], where: str) -> Any:
        try:
            return self._make(**values)
        except (ValueError, TypeError) as error:  # of a `__post_init__`
            raise explained(error, where) from None


class Later(Kind):
    """A type inside of itself: its kind is still being made."""

    def __init__(self, name: str) -> None:
        self.schema = {"$ref": f"#/$defs/{name}"}
        self.name = name
        self.kind: Kind = self

    def read(self, value: Any, where: str = "") -> Any:
        return self.kind.read(value, where)

    def begun(self, value: Any, depth: int) -> Any:
        return self.kind.begun(value, depth)


def grown_fields(
    value: dict[str, Any], depth: int, kind_of: Callable[[str], Kind]
) -> dict[str, Any]:
    """The fields of an unfinished object, of which the last one may be unfinished."""
    last = next(reversed(value), None)
    grown = {}
    for name, each in value.items():
        one = kind_of(name).grow(each, depth - 1 if name == last else 0)
        if one is not MISSING:
            grown[name] = one
    return grown


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise must_be(where, "a list", value)
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise must_be(where, "an object", value)
    return value


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise must_be(where, "a number that fits a float", value)
    return number


def is_json(value: Any) -> bool:
    return type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def explained(error: Exception, where: str) -> Mismatch:
    """What a class says against its values; pydantic's first complaint in a line of ours."""
    if not type(error).__module__.startswith("pydantic"):
        return Mismatch(where, f"was refused: {error}")
    first = error.errors(include_url=False)[0]  # type: ignore[attr-defined]
    for step in first["loc"]:
        where = f"{where}[{step}]" if isinstance(step, int) else inside(where, step)
    said = str(first["msg"])
    is_missing = first["type"] == "missing"
    return Mismatch(where, "is missing" if is_missing else f"was refused: {said}")
