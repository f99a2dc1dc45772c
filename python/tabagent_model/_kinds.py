"""Python types as JSON: what a value looks like, and how the object is made of it.

A kind has a JSON schema, reads a JSON value as an object of its type, and shows what there is of an
object whose JSON is still being written.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import inspect
import math
import pathlib
import sys
import types
import typing
import uuid
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any, Literal, NamedTuple, Union

from ._json import Mismatch, must_be
from ._json_schema import KINDS, check, check_names, deepest, inside, one_of, same
from .errors import InvalidRequestError

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
        return _grown(_object(value, ""), depth, lambda name: self._item)


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
        if isinstance(self.default, (str, int, float)) and _is_json(self.default):
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
        check_names(_object(value, where), self._fields, where)
        values = {}
        for name, field in self._fields.items():
            if name in value:
                values[name] = field.kind.read(value[name], inside(where, name))
            elif field.is_required:
                raise Mismatch(inside(where, name), "is missing")
        return self._made(values, where)

    def begun(self, value: Any, depth: int) -> Any:
        """What is not there yet is None, if it has no default."""
        check_names(_object(value, ""), self._fields, "")
        values = _grown(value, depth, lambda name: self._fields[name].kind)
        if self._fills_in:
            required = [name for name, field in self._fields.items() if field.is_required]
            values = dict.fromkeys(required) | values
        return self._made(values, "")

    def _made(self, values: dict[str, Any], where: str) -> Any:
        try:
            return self._make(**values)
        except (ValueError, TypeError) as error:  # of a `__post_init__`
            raise _explained(error, where) from None


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


class Pydantic(Kind):
    """Whatever pydantic has a schema for; it reads the value, too."""

    def __init__(self, hint: Any, kinds: Kinds, where: str) -> None:
        self._hint, self._kinds = hint, kinds
        try:
            self._adapter = hint if _is_adapter(hint) else _pydantic().TypeAdapter(hint)
            self.schema = kinds.adopted(self._adapter.json_schema())
        except Exception as error:  # its errors share no class with those of hooks in models
            raise kinds.refusal(where, hint, f" for pydantic: {error}") from None

    def read(self, value: Any, where: str = "") -> Any:
        import json

        try:
            return self._adapter.validate_json(json.dumps(value))
        except ValueError as error:
            raise _explained(error, where) from None

    def begun(self, value: Any, depth: int) -> Any:
        """A model that was not validated: what is not there yet is None, if it has no default."""
        if not self._fields or not isinstance(value, dict):
            return MISSING
        known = {name: each for name, each in value.items() if name in self._fields}
        values = _grown(known, depth, lambda name: self._fields[name].kind)
        required = [name for name, field in self._fields.items() if field.is_required]
        return self._hint.model_construct(**dict.fromkeys(required) | values)

    @cached_property
    def _fields(self) -> dict[str, Field]:
        """Those of a model. Made when they are needed: a model may have itself in a field."""
        found = {}
        for name, field in getattr(self._hint, "model_fields", {}).items():
            try:
                kind = self._kinds.of(field.annotation, name)
            except InvalidRequestError:
                kind = Anything()
            found[field.alias or name] = Field(kind, field.is_required())
        return found


class Kinds:
    """Makes the kinds of type hints. `name` is what an error says cannot be made of a type."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._definitions: dict[str, Any] = {}
        """Of types that have themselves inside."""
        self._later: dict[Any, Later] = {}

    def schema(self, kind: Kind) -> dict[str, Any]:
        """What the kind's schema says, with the definitions it refers to."""
        if not self._definitions:
            return kind.schema
        return {**kind.schema, "$defs": self._definitions}

    def of(self, hint: Any, where: str) -> Kind:
        if hint is Any or hint is object or hint is inspect.Parameter.empty:
            return Anything()
        if _is_adapter(hint) or hasattr(hint, "__get_pydantic_core_schema__"):
            return Pydantic(hint, self, where)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            return self._annotated(hint, where)
        if not isinstance(hint, Hashable):  # a list of something, say
            raise self.refusal(where, hint)
        if hint in _PLAIN:
            return Plain(_PLAIN[hint])
        if isinstance(hint, typing.NewType):
            return self.of(hint.__supertype__, where)
        if type(hint).__name__ == "TypeAliasType":
            return self.of(hint.__value__, where)
        if _last_name(origin) in ("Required", "NotRequired", "ReadOnly"):
            return self.of(arguments[0], where)
        if origin is Literal:
            objects = [(v.value if isinstance(v, enum.Enum) else v, v) for v in arguments]
            return self._choice(objects, hint, where)
        if origin in (Union, types.UnionType):
            return OneOf([self.of(each, where) for each in arguments])
        kind = self._collection(origin or hint, arguments, where)
        return kind or self._class(hint, where)

    def adopted(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema of pydantic's, whose definitions become ours, under names that are free."""
        names = {}
        for name, definition in schema.pop("$defs", {}).items():
            free, number = name, 1
            while self._definitions.get(free, definition) != definition:
                free, number = f"{name}{number}", number + 1
            self._definitions[free] = definition
            if free != name:
                names[f"#/$defs/{name}"] = f"#/$defs/{free}"
        if names:
            for reference in names.values():
                name = reference.removeprefix("#/$defs/")
                self._definitions[name] = _renamed(self._definitions[name], names)
            schema = _renamed(schema, names)
        return schema

    def refusal(self, where: str, hint: Any, why: str = "") -> InvalidRequestError:
        name = _name_of(hint)
        place = f" (at `{where}`)" if where and where != name else ""
        message = f"`{self._name}` cannot be made of the type `{name}`{place}{why}"
        known = "str, int, float, bool, None, list, dict, tuple, set, Literal, Enum, Optional"
        hint_text = f"there are {known}, dataclasses, TypedDict, NamedTuple, pydantic's"
        return InvalidRequestError(message, hint=None if why else hint_text, name=self._name)

    def _annotated(self, hint: Any, where: str) -> Kind:
        base, *notes = typing.get_args(hint)
        if any(type(note).__module__.startswith(("pydantic", "annotated_types")) for note in notes):
            return Pydantic(hint, self, where)
        return self.of(base, where)

    def _choice(self, objects: list[tuple[Any, Any]], hint: Any, where: str) -> Kind:
        if not objects or not all(value is None or _is_json(value) for value, _ in objects):
            raise self.refusal(where, hint)
        return Choice(objects)

    def _collection(self, origin: Any, arguments: tuple[Any, ...], where: str) -> Kind | None:
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return Fixed([self.of(each, where) for each in arguments])
        if origin in _ITEMS:
            item = self.of(arguments[0] if arguments else Any, where)
            return Items(item, _ITEMS[origin])
        if origin in _ENTRIES:
            if arguments and arguments[0] is not str:
                raise self.refusal(where, arguments[0], ": the keys of JSON are strings")
            return Entries(self.of(arguments[1] if arguments else Any, where))
        return None

    def _class(self, hint: Any, where: str) -> Kind:
        if hint in _WRITTEN:
            return Written(*_WRITTEN[hint])
        if not isinstance(hint, type):
            raise self.refusal(where, hint)
        if issubclass(hint, enum.Enum):
            return self._choice([(member.value, member) for member in hint], hint, where)
        if _is_typed_dict(hint):
            return self._record(hint, _fields_of_typed_dict, dict, fills_in=False)
        if dataclasses.is_dataclass(hint):
            return self._record(hint, _fields_of_dataclass, hint)
        if issubclass(hint, tuple) and hasattr(hint, "_field_defaults"):
            return self._record(hint, _fields_of_named_tuple, hint)
        raise self.refusal(where, hint)

    def _record(
        self, cls: type, fields_of: FieldsOf, make: Callable[..., Any], *, fills_in: bool = True
    ) -> Kind:
        if cls in self._later:
            return self._later[cls]
        later = self._later[cls] = Later(self._free_name(cls.__name__))
        kind = Record(fields_of(self, cls), make, description=_said_of(cls), fills_in=fills_in)
        if not _mentions(kind.schema, later.schema["$ref"]):
            del self._later[cls]
            return kind
        self._definitions[later.name] = kind.schema
        later.kind = kind
        return later

    def hints(self, of: Any, where: str) -> dict[str, Any]:
        """The type hints of a class or function, all names in them found."""
        try:
            return typing.get_type_hints(of, include_extras=True)
        except Exception as error:  # a hint in quotes is code, and may fail in any way
            message = f"`{self._name}`: the type hints of `{where}` cannot be read: {error}"
            raise InvalidRequestError(message, name=self._name) from None

    def _free_name(self, name: str) -> str:
        taken = {later.name for later in self._later.values()}
        free, number = name, 1
        while free in self._definitions or free in taken:
            free, number = f"{name}{number}", number + 1
        return free


FieldsOf = Callable[[Kinds, Any], dict[str, Field]]


def _fields_of_dataclass(kinds: Kinds, cls: Any) -> dict[str, Field]:
    hints = kinds.hints(cls, cls.__name__)
    fields = {}
    for each in dataclasses.fields(cls):
        if each.init:
            hint = hints[each.name]
            is_required = each.default is each.default_factory is dataclasses.MISSING
            said = each.metadata.get("description") or description_of(hint)
            default = MISSING if each.default is dataclasses.MISSING else each.default
            kind = kinds.of(hint, f"{cls.__name__}.{each.name}")
            fields[each.name] = Field(kind, is_required, said, default)
    return fields


def _fields_of_typed_dict(kinds: Kinds, cls: Any) -> dict[str, Field]:
    fields = {}
    for name, hint in kinds.hints(cls, cls.__name__).items():
        mark = _last_name(typing.get_origin(hint))
        # Where hints are written as text, `__required_keys__` does not know of these marks.
        is_required = name in cls.__required_keys__ if "Required" not in mark else mark[0] == "R"
        kind = kinds.of(hint, f"{cls.__name__}.{name}")
        fields[name] = Field(kind, is_required, description_of(hint))
    return fields


def _fields_of_named_tuple(kinds: Kinds, cls: Any) -> dict[str, Field]:
    fields = {}
    hints, defaults = kinds.hints(cls, cls.__name__), cls._field_defaults
    for name in cls._fields:
        hint = hints.get(name, Any)
        default = defaults.get(name, MISSING)
        kind = kinds.of(hint, f"{cls.__name__}.{name}")
        fields[name] = Field(kind, name not in defaults, description_of(hint), default)
    return fields


def description_of(hint: Any) -> str | None:
    """What stands beside a type: `Annotated[str, "the city"]`, or a `Doc`, or pydantic's."""
    for note in getattr(hint, "__metadata__", ()):
        said = note if isinstance(note, str) else None
        said = said or getattr(note, "documentation", None) or getattr(note, "description", None)
        if isinstance(said, str):
            return said
    return None


def _said_of(cls: type) -> str | None:
    """The docstring of a class, if somebody wrote it."""
    said = cls.__dict__.get("__doc__") or ""
    is_made = said.startswith((f"{cls.__name__}(", "dict(", "dict() ->"))
    return None if is_made or not said.strip() else inspect.cleandoc(said)


def _grown(value: dict[str, Any], depth: int, kind_of: Callable[[str], Kind]) -> dict[str, Any]:
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


def _is_json(value: Any) -> bool:
    return type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def _mentions(schema: Any, reference: str) -> bool:
    if isinstance(schema, dict):
        return any(_mentions(each, reference) for each in schema.values())
    if isinstance(schema, list):
        return any(_mentions(each, reference) for each in schema)
    return bool(schema == reference)


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    if isinstance(schema, dict):
        return {name: _renamed(each, names) for name, each in schema.items()}
    if isinstance(schema, list):
        return [_renamed(each, names) for each in schema]
    return names.get(schema, schema) if isinstance(schema, str) else schema


def _explained(error: Exception, where: str) -> Mismatch:
    """What a class says against its values; pydantic's first complaint in a line of ours."""
    told = getattr(error, "errors", None)
    if told is None:
        return Mismatch(where, f"was refused: {error}")
    first = told(include_url=False)[0]
    for step in first["loc"]:
        where = f"{where}[{step}]" if isinstance(step, int) else inside(where, step)
    said = str(first["msg"])
    is_missing = first["type"] == "missing"
    return Mismatch(where, "is missing" if is_missing else f"was refused: {said}")


def _pydantic() -> Any:
    """Only asked for when a type of its own was given, so it is there."""
    import pydantic

    return pydantic


def _is_adapter(hint: Any) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(hint, pydantic.TypeAdapter)


def _is_typed_dict(hint: type) -> bool:
    return issubclass(hint, dict) and hasattr(hint, "__required_keys__")


def _last_name(origin: Any) -> str:
    """Of `typing.NotRequired`, which Python 3.10 has in `typing_extensions` only."""
    return str(origin).rpartition(".")[2]


def _name_of(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")[:60]


def _moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(_with_offset(text))


def _time(text: str) -> datetime.time:
    return datetime.time.fromisoformat(_with_offset(text))


def _with_offset(text: str) -> str:
    """Python 3.10 does not know that Z is the time of Greenwich."""
    return f"{text[:-1]}+00:00" if text[-1:] in ("Z", "z") else text


_PLAIN = {
    **{str: "string", int: "integer", float: "number", bool: "boolean"},
    **{None: "null", type(None): "null"},
}
_ITEMS: dict[Any, Callable[[list[Any]], Any]] = {
    **{list: list, Sequence: list, Collection: list, Iterable: list},
    **{set: set, AbstractSet: set, frozenset: frozenset, tuple: tuple},
}
_ENTRIES = (dict, Mapping)
_WRITTEN: dict[Any, tuple[str, str | None, Callable[[str], Any]]] = {
    datetime.datetime: ("a date with a time", "date-time", _moment),
    datetime.date: ("a date like 2026-01-31", "date", datetime.date.fromisoformat),
    datetime.time: ("a time like 12:30:00", "time", _time),
    uuid.UUID: ("a UUID", "uuid", uuid.UUID),
    pathlib.Path: ("a path", None, pathlib.Path),
}
