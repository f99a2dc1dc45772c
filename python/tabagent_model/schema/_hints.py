"""Type hints, and the kinds that they stand for."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import inspect
import pathlib
import types
import typing
import uuid
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, Union

from ..errors import InvalidRequestError
from ._kinds import (
    MISSING,
    Anything,
    Choice,
    Entries,
    Field,
    Fixed,
    Items,
    Kind,
    Later,
    OneOf,
    Plain,
    Record,
    Written,
    is_json,
)
from ._pydantic import Pydantic, adopted, free_name, is_adapter


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
        if is_adapter(hint) or hasattr(hint, "__get_pydantic_core_schema__"):
            return self._pydantic(hint, where)
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
            return self.of(hint.__value__, where)  # type: ignore[attr-defined]
        if _last_name(origin) in ("Required", "NotRequired", "ReadOnly"):
            return self.of(arguments[0], where)
        if origin is Literal:
            objects = [(v.value if isinstance(v, enum.Enum) else v, v) for v in arguments]
            return self._choice(objects, hint, where)
        if origin in (Union, types.UnionType):
            return OneOf([self.of(each, where) for each in arguments])
        kind = self._collection(origin or hint, arguments, where)
        return kind or self._class(hint, where)

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
            return self._pydantic(hint, where)
        return self.of(base, where)

    def _pydantic(self, hint: Any, where: str) -> Kind:
        try:
            kind = Pydantic(hint, self.of)
        except Exception as error:  # its own, or of a model's hooks
            raise self.refusal(where, hint, f" for pydantic: {error}") from None
        kind.schema = adopted(kind.schema, self._definitions)
        return kind

    def _choice(self, objects: list[tuple[Any, Any]], hint: Any, where: str) -> Kind:
        if not objects or not all(value is None or is_json(value) for value, _ in objects):
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
        taken = {later.name for later in self._later.values()} | self._definitions.keys()
        later = self._later[cls] = Later(free_name(cls.__name__, dict.fromkeys(taken)))
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


def _mentions(schema: Any, reference: str) -> bool:
    if isinstance(schema, dict):
        return any(_mentions(each, reference) for each in schema.values())
    if isinstance(schema, list):
        return any(_mentions(each, reference) for each in schema)
    return bool(schema == reference)


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


_PLAIN: dict[Any, str] = {
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
