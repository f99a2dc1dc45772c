"""What an answer must look like: the constraint for the engine, and the way back to an object.

Schema.of(City)                    a dataclass, TypedDict, NamedTuple, pydantic model or adapter
Schema.of(list[City] | None)       …and what can be built of them, Literal, Enum and plain types
Schema.of(["yes", "no"])           one of these texts
Schema.of({"type": "object"})      a JSON schema: the answer is what its JSON says
Schema.of({"regex": "[a-z]+"})     or {"lark": …}, {"grammar": …}: the answer is the text
"""

from __future__ import annotations

import enum
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InvalidRequestError
from ._hints import Kinds
from ._json import UnfinishedJson, must_be, read
from ._json_schema import one_of
from ._kinds import MISSING, Anything, Choice, Kind

if TYPE_CHECKING:
    from typing_extensions import Self


class Growing:
    """The growing object of an answer that is still being written. Made by `Schema.growing`."""

    def feed(self, piece: str) -> Any | None:
        """The object so far, after one more piece of text; None if there is nothing new to show."""
        return None


class Schema:
    """What an answer must look like. Made by `Schema.of`."""

    constraint: dict[str, Any]
    """What the engine keeps to while the answer is written: a `syntax` and a `text` in it."""
    json_schema: dict[str, Any] | None = None
    """None if the answer is no JSON."""

    @classmethod
    def of(cls, given: Any) -> Schema:
        """The schema of a type, of a list of choices, or of a JSON schema, regex or grammar."""
        if isinstance(given, Schema):
            return given
        if isinstance(given, Mapping):
            return _Text.of_mapping(given) or _Json.of_schema(given)
        if isinstance(given, (list, tuple)) and not hasattr(given, "_fields"):
            return _Choices.of_texts(given)
        return _of_type(given)

    def parse(self, text: str) -> Any:
        """The object that a whole answer stands for; a ValueError says what is wrong with it."""
        raise NotImplementedError

    def parse_partial(self, text: str) -> Any | None:
        """The object as far as the beginning of an answer tells it; None if that is nothing yet.

        Fields that are not there yet have their default, or are None. A string grows; a number, or
        one of several choices, is there when it is complete.
        """
        return self.growing().feed(text)

    def growing(self) -> Growing:
        """As `parse_partial`, for an answer that comes piece by piece."""
        return Growing()

    def outcome(self, text: str, is_cut_short: bool) -> tuple[Any, str | None]:
        """The object and None, or None and what is wrong with the answer."""
        if is_cut_short and not self._ends_by_itself(text):
            return None, "the answer was cut short"
        try:
            return self.parse(text), None
        except ValueError as error:
            return None, str(error)
        except Exception as error:  # of a class's own checks
            return None, f"{type(error).__name__}: {error}"

    def _ends_by_itself(self, text: str) -> bool:
        """Whether nothing could follow, so that it does not matter what ended it."""
        return False

    def behind(self, thinking: tuple[str, str]) -> dict[str, Any]:
        """The constraint of an answer that may begin with thoughts between these tags."""
        if (rule := self._rule()) is None:
            return self.constraint
        import json

        rules = [
            r"start: (thought /\n{0,2}/)? answer",
            rf"thought[suffix={json.dumps(thinking[1])}]: /{_literally(thinking[0])}(.|\n)*/",
            f"answer: {rule}",
        ]
        return {"syntax": "lark", "text": "\n".join(rules)}

    def _rule(self) -> str | None:
        """The constraint as a rule of a Lark grammar, if it can be one."""
        return None

    def __repr__(self) -> str:
        return f"<Schema {self.constraint['syntax']}: {self.constraint['text']:.60}>"


def _of_type(given: Any) -> Schema:
    if given is None or isinstance(given, (str, bytes, int, float)):
        message = f"`schema` must be a type, a list of texts or a JSON schema, got {given!r:.60}"
        raise InvalidRequestError(message, name="schema")
    kinds = Kinds("schema")
    kind = kinds.of(given, getattr(given, "__name__", ""))
    is_choice = typing.get_origin(given) is Literal or isinstance(given, enum.EnumMeta)
    if is_choice and isinstance(kind, Choice):
        return _Choices(kind.objects)
    return _Json(kind, _closed(kinds.schema(kind)))


class _Json(Schema):
    """Whatever has a JSON schema."""

    def __init__(self, kind: Kind, schema: dict[str, Any]) -> None:
        import json

        self._kind = kind
        self.json_schema = schema
        text = json.dumps(schema, ensure_ascii=False)
        self.constraint = {"syntax": "json_schema", "text": text}

    @classmethod
    def of_schema(cls, given: Mapping[str, Any]) -> Self:
        import json

        try:
            schema = json.loads(json.dumps(given, allow_nan=False, default=dict))
        except (TypeError, ValueError, RecursionError) as error:
            message = f"`schema` must be a JSON schema, and this dict is no JSON: {error}"
            raise InvalidRequestError(message, name="schema") from None
        return cls(Anything(schema), schema)

    def parse(self, text: str) -> Any:
        return self._kind.read(read(text))

    def growing(self) -> Growing:
        return _GrowingJson(self._kind)

    def _rule(self) -> str | None:
        import json

        assert self.json_schema is not None
        schema = {"x-guidance": {"whitespace_pattern": _SPACE}, **self.json_schema}
        return f"%json {json.dumps(schema, ensure_ascii=False)}"

    def _ends_by_itself(self, text: str) -> bool:
        return text.rstrip().endswith(("}", "]", '"'))  # of a number there may be more


class _GrowingJson(Growing):
    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._json = UnfinishedJson()
        self._shown_at = 0

    def feed(self, piece: str) -> Any | None:
        self._json.feed(piece)
        # Making the object takes time for all of the text. So it is made 50 times while the text
        # becomes twice as long, however small the pieces are: that stays linear.
        if self._json.size < self._shown_at * 1.014:
            return None
        self._shown_at = self._json.size
        value = self._json.value()
        try:
            shown = None if value is None else self._kind.grow(value, self._json.depth)
        except Exception:  # a class may say anything against half of its object
            return None
        return None if shown is MISSING else shown


class _Choices(Schema):
    """One of some texts, each of which stands for an object."""

    def __init__(self, objects: Sequence[tuple[Any, Any]]) -> None:
        import json

        self._objects = {
            value if isinstance(value, str) else json.dumps(value): one for value, one in objects
        }
        if len(self._objects) < len(objects) or not all(map(str.strip, self._objects)):
            message = "the choices of `schema` must be different texts, and none of them empty"
            raise InvalidRequestError(message, name="schema")
        self.constraint = {"syntax": "regex", "text": "|".join(map(_literally, self._objects))}

    @classmethod
    def of_texts(cls, given: Iterable[Any]) -> Self:
        texts = list(given)
        if not texts or not all(isinstance(each, str) for each in texts):
            message = f"`schema` must be a type or a list of texts, got {given!r:.60}"
            raise InvalidRequestError(message, name="schema")
        return cls([(each, each) for each in texts])

    def _rule(self) -> str | None:
        return _pattern(self.constraint["text"])

    def parse(self, text: str) -> Any:
        for choice in (text, text.strip()):
            if choice in self._objects:
                return self._objects[choice]
        raise must_be("", one_of(self._objects), text)


class _Text(Schema):
    """A text that a regex or a grammar describes."""

    def __init__(self, syntax: str, text: str) -> None:
        self.constraint = {"syntax": syntax, "text": text}

    @classmethod
    def of_mapping(cls, given: Mapping[str, Any]) -> Self | None:
        """None if it is a JSON schema."""
        (name,) = given if len(given) == 1 else ("",)
        if name not in _SYNTAXES:
            return None
        text = given[name]
        if not isinstance(text, str) or not text:
            message = f"`schema` must have a text as `{name}`, got {text!r:.60}"
            raise InvalidRequestError(message, name="schema")
        return cls(_SYNTAXES[name], text)

    def parse(self, text: str) -> Any:
        return text

    def growing(self) -> Growing:
        return _GrowingText()

    def _rule(self) -> str | None:
        return _pattern(self.constraint["text"]) if self.constraint["syntax"] == "regex" else None


_SYNTAXES = {"regex": "regex", "lark": "lark", "grammar": "gbnf"}


class _GrowingText(Growing):
    def __init__(self) -> None:
        self._text = ""

    def feed(self, piece: str) -> Any | None:
        self._text += piece
        return self._text if piece else None


def _literally(text: str) -> str:
    """A text as a regex of Rust, which wants other escapes than Python."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text)


def _pattern(regex: str) -> str | None:
    """A regex as Lark writes it, which takes it on one line only."""
    slashed = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", regex, flags=re.DOTALL)
    return None if "\n" in regex else f"/{slashed}/"


# Between the parts of an answer, as `constraint/schema.rs` has it for schemas alone.
_SPACE = r" |\n{1,2}[ \t]{0,20}"


def _closed(schema: Any) -> Any:
    """The JSON schema of a type, for the engine: fields that nobody declared are not written, and
    what only a whole answer can tell, like equal items of a set, is left to `parse`."""
    if not isinstance(schema, dict):
        return schema
    closed = {word: each for word, each in schema.items() if word != "uniqueItems"}
    for word in ("properties", "$defs"):
        if isinstance(closed.get(word), dict):
            closed[word] = {name: _closed(each) for name, each in closed[word].items()}
    for word in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(closed.get(word), list):
            closed[word] = [_closed(each) for each in closed[word]]
    for word in ("items", "additionalProperties"):
        closed |= {word: _closed(closed[word])} if word in closed else {}
    if "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
