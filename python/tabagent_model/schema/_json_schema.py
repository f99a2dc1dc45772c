"""Does a JSON value keep to a JSON schema?

What decides between values is here: types, fields, items, ranges, choices. Patterns and formats are
not: the constraint has enforced them while the answer was written, and a foreign pattern could take
for ever here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ._json import Mismatch, must_be, shown

if TYPE_CHECKING:
    from typing import TypeGuard


def check(value: Any, schema: Any, where: str = "") -> None:
    """Raise a Mismatch that names the place, if it does not."""
    try:
        _Check(schema).value(value, schema, where)
    except RecursionError:
        raise Mismatch(where, "is nested too deeply to be checked") from None


class _TooLong(Mismatch):
    """Nobody knows whether it fits."""


class _Check:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._steps = 0

    def value(self, value: Any, schema: Any, where: str) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS:  # alternatives in alternatives double with each level
            raise _TooLong(where, f"takes more than {_MOST_STEPS} steps to be checked")
        if schema is False:
            raise Mismatch(where, "is not allowed here")
        if not isinstance(schema, Mapping):
            return
        if isinstance(schema.get("$ref"), str):
            self.value(value, self._found(schema["$ref"], where), where)
        _check_kind(value, schema, where)
        self._alternatives(value, schema, where)
        if isinstance(value, dict):
            self._fields(value, schema, where)
        elif isinstance(value, list):
            self._items(value, schema, where)
        elif isinstance(value, str):
            _check_size(len(value), schema, where, "Length", "characters")
        elif _is_number(value):
            _check_range(value, schema, where)

    def _alternatives(self, value: Any, schema: Mapping[str, Any], where: str) -> None:
        for each in _list(schema.get("allOf")):
            self.value(value, each, where)
        for word in ("anyOf", "oneOf"):
            if choices := _list(schema.get(word)):
                errors = [self._mismatch(value, each, where) for each in choices]
                fits = errors.count(None)
                if not fits:
                    raise deepest(filter(None, errors))
                if word == "oneOf" and fits > 1:
                    raise Mismatch(where, f"fits {fits} of the forms it can have, and must fit one")
        if "not" in schema and self._mismatch(value, schema["not"], where) is None:
            raise Mismatch(where, f"must not be {shown(value)}")

    def _mismatch(self, value: Any, schema: Any, where: str) -> Mismatch | None:
        try:
            self.value(value, schema, where)
        except _TooLong:
            raise
        except Mismatch as error:
            return error
        return None

    def _fields(self, value: dict[str, Any], schema: Mapping[str, Any], where: str) -> None:
        known = schema.get("properties")
        known = known if isinstance(known, Mapping) else {}
        for name in _list(schema.get("required")):
            if name not in value:
                raise Mismatch(inside(where, name), "is missing")
        others = None if "patternProperties" in schema else schema.get("additionalProperties")
        if others is False:
            check_names(value, known, where)
        for name, each in value.items():
            self.value(each, known.get(name, others), inside(where, name))
        _check_size(len(value), schema, where, "Properties", "fields")

    def _items(self, value: list[Any], schema: Mapping[str, Any], where: str) -> None:
        first, rest = _list(schema.get("prefixItems")), schema.get("items")
        for index, each in enumerate(value):
            kind = first[index] if index < len(first) else rest
            self.value(each, kind, f"{where}[{index}]")
        _check_size(len(value), schema, where, "Items", "items")

    def _found(self, reference: str, where: str) -> Any:
        found = self._root
        for name in reference.removeprefix("#").split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        if found is None or not reference.startswith("#"):
            raise Mismatch(where, f"cannot be checked: the schema has no {shown(reference)}")
        return found


def inside(where: str, name: object) -> str:
    """The place of a field."""
    short = str(name)[:40]
    return f"{where}.{short}" if where else short


def check_names(value: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a field that is none."""
    known = list(known)
    for name in value:
        if name not in known:
            fields = ", ".join(f"`{each}`" for each in known) or "none"
            raise Mismatch(inside(where, name), f"is no field here; there are {fields}")


def deepest(errors: Iterable[Mismatch]) -> Mismatch:
    """Of alternatives that all failed, the one that came the furthest is the one that was meant."""
    return max(errors, key=lambda error: len(error.where))


def _check_kind(value: Any, schema: Mapping[str, Any], where: str) -> None:
    kinds = schema.get("type")
    names = [kinds] if isinstance(kinds, str) else _list(kinds)
    known = [name for name in names if isinstance(name, str) and name in KINDS]
    if known and not any(KINDS[name].fits(value) for name in known):
        raise must_be(where, " or ".join(KINDS[name].words for name in known), value)
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(allowed, list) and not any(same(value, each) for each in allowed):
        raise must_be(where, one_of(allowed), value)


def one_of(values: Iterable[object]) -> str:
    words = [shown(value) for value in values]
    return words[0] if len(words) == 1 else "one of " + ", ".join(words[:20])


def same(value: Any, other: Any) -> bool:
    """Equal as JSON: 1 is 1.0, but not true."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class JsonKind:
    """One of the types of JSON: how it is called, and what belongs to it."""

    def __init__(self, words: str, fits: Callable[[Any], bool]) -> None:
        self.words, self.fits = words, fits


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


def _is_multiple(value: float, step: float) -> bool:
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    try:
        times = value / step
        return abs(times - round(times)) <= 1e-9 * max(1.0, abs(times))
    except OverflowError:  # too large for the sums of floats
        return True


KINDS = {
    "string": JsonKind("a string", lambda value: isinstance(value, str)),
    "integer": JsonKind("a whole number", _is_whole),
    "number": JsonKind("a number", _is_number),
    "boolean": JsonKind("true or false", lambda value: isinstance(value, bool)),
    "null": JsonKind("null", lambda value: value is None),
    "array": JsonKind("a list", lambda value: isinstance(value, list)),
    "object": JsonKind("an object", lambda value: isinstance(value, dict)),
}


def _check_range(value: float, schema: Mapping[str, Any], where: str) -> None:
    for word, holds, words in _RANGES:
        limit = schema.get(word)
        if _is_number(limit) and not holds(value, limit):
            raise must_be(where, f"{words} {limit}", value)
    step = schema.get("multipleOf")
    if _is_number(step) and step > 0 and not _is_multiple(value, step):
        raise must_be(where, f"a multiple of {step}", value)


_RANGES: tuple[tuple[str, Callable[[float, float], bool], str], ...] = (
    ("minimum", lambda value, limit: value >= limit, "at least"),
    ("maximum", lambda value, limit: value <= limit, "at most"),
    ("exclusiveMinimum", lambda value, limit: value > limit, "more than"),
    ("exclusiveMaximum", lambda value, limit: value < limit, "less than"),
)


def _check_size(size: int, schema: Mapping[str, Any], where: str, word: str, unit: str) -> None:
    least, most = schema.get(f"min{word}"), schema.get(f"max{word}")
    if _is_number(least) and size < least:
        raise Mismatch(where, f"must have at least {least} {unit}, got {size}")
    if _is_number(most) and size > most:
        raise Mismatch(where, f"must have at most {most} {unit}, got {size}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


_MOST_STEPS = 200_000
