"""Types, choices and schemas: what the engine is told, and what becomes of the answer."""

from __future__ import annotations

import datetime
import enum
import json
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Optional, TypedDict

import pytest
from pydantic import BaseModel, Field, TypeAdapter, create_model, field_validator
from typing_extensions import NotRequired

from tabagent_model import InvalidRequestError
from tabagent_model.schema import Schema


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Sight:
    name: str
    year: int | None = None


@dataclass
class City:
    """A place where many people live."""

    name: str
    population: int
    mood: Mood = Mood.GOOD
    sights: list[Sight] = field(default_factory=list)


@dataclass
class Branch:
    name: str
    branches: list[Branch] = field(default_factory=list)


class Point(NamedTuple):
    x: float
    y: float = 0.0


class Person(TypedDict):
    name: str
    age: NotRequired[int]


class Town(BaseModel):
    name: str
    population: int = Field(ge=0)
    twin: Town | None = None
    tags: set[str] = set()


@dataclass
class Cat:
    kind: Literal["cat"]
    lives: int


@dataclass
class Dog:
    kind: Literal["dog"]
    tricks: list[str]


NUMBER, TEXT = {"type": "integer"}, {"type": "string"}
NULL = {"type": "null"}
SIGHT = {
    "type": "object",
    "properties": {"name": TEXT, "year": {"anyOf": [NUMBER, NULL]}},
    "required": ["name"],
    "additionalProperties": False,
}
SCHEMAS: list[tuple[Any, Any]] = [
    (str, TEXT),
    (int, NUMBER),
    (float, {"type": "number"}),
    (bool, {"type": "boolean"}),
    (Any, {}),
    (dict, {"type": "object"}),
    (list[int], {"type": "array", "items": NUMBER}),
    (Sequence[str], {"type": "array", "items": TEXT}),
    (set[str], {"type": "array", "items": TEXT}),
    (Mapping[str, int], {"type": "object", "additionalProperties": NUMBER}),
    (
        tuple[int, str],
        {"type": "array", "prefixItems": [NUMBER, TEXT], "minItems": 2, "maxItems": 2},
    ),
    (Optional[int], {"anyOf": [NUMBER, NULL]}),  # noqa: UP045 - the old way counts, too
    (int | str, {"anyOf": [NUMBER, TEXT]}),
    (list[Literal["a", 1]], {"type": "array", "items": {"enum": ["a", 1]}}),
    (list[Mood], {"type": "array", "items": {"type": "string", "enum": ["good", "bad"]}}),
    (datetime.date, {"type": "string", "format": "date"}),
    (Sight, SIGHT),
    (
        City,
        {
            "type": "object",
            "properties": {
                "name": TEXT,
                "population": NUMBER,
                "mood": {"type": "string", "enum": ["good", "bad"]},
                "sights": {"type": "array", "items": SIGHT},
            },
            "required": ["name", "population"],
            "description": "A place where many people live.",
            "additionalProperties": False,
        },
    ),
    (
        Point,
        {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y": {"type": "number", "default": 0.0}},
            "required": ["x"],
            "additionalProperties": False,
        },
    ),
    (
        Person,
        {
            "type": "object",
            "properties": {"name": TEXT, "age": NUMBER},
            "required": ["name"],
            "additionalProperties": False,
        },
    ),
    (
        Branch,
        {
            "$ref": "#/$defs/Branch",
            "$defs": {
                "Branch": {
                    "type": "object",
                    "properties": {
                        "name": TEXT,
                        "branches": {"type": "array", "items": {"$ref": "#/$defs/Branch"}},
                    },
                    "required": ["name"],
                    "additionalProperties": False,
                }
            },
        },
    ),
]


@pytest.mark.parametrize(("given", "expected"), SCHEMAS, ids=lambda value: str(value)[:40])
def test_a_type_has_a_json_schema(given: Any, expected: Any):
    schema = Schema.of(given)
    assert schema.json_schema == expected
    assert schema.constraint == {"syntax": "json_schema", "text": json.dumps(expected)}


def test_a_schema_of_pydantic_is_closed_and_the_engine_need_not_compare_items():
    schema = Schema.of(Town).json_schema
    assert schema is not None
    town = schema["$defs"]["Town"]
    assert schema["$ref"] == "#/$defs/Town"
    assert town["additionalProperties"] is False
    assert town["properties"]["population"]["minimum"] == 0
    assert "uniqueItems" not in town["properties"]["tags"]


def test_models_of_the_same_name_inside_of_a_type_keep_apart():
    def node(hint: Any) -> Any:
        return create_model("Node", value=(hint, ...), next=(Optional["Node"], None))  # noqa: F821

    schema = Schema.of(tuple[node(int), node(str)])
    first, second = schema.parse('[{"value": 1, "next": {"value": 2}}, {"value": "a"}]')
    assert (first.next.value, second.value) == (2, "a")
    definitions = schema.json_schema["$defs"]  # type: ignore[index]
    kinds = {each["properties"]["value"]["type"] for each in definitions.values()}
    assert kinds == {"integer", "string"}


def test_a_json_schema_is_taken_as_it_is():
    given = {"type": "object", "properties": {"a": {"type": "integer"}}}
    schema = Schema.of(given)
    assert schema.json_schema == given
    assert schema.parse('{"a": 1, "b": 2}') == {"a": 1, "b": 2}
    assert Schema.of(schema) is schema


READ: list[tuple[Any, str, Any]] = [
    (int, " 5 ", 5),
    (int, "5.0", 5),
    (float, "5", 5.0),
    (list[int] | None, "null", None),
    (set[int], "[1, 2, 1]", {1, 2}),
    (tuple[int, ...], "[1, 2]", (1, 2)),
    (tuple[int, str], '[1, "a"]', (1, "a")),
    (dict[str, Mood], '{"a": "bad"}', {"a": Mood.BAD}),
    (list[Literal[1, True]], "[true, 1]", [True, 1]),
    (datetime.datetime, '"2026-01-31T10:00:00Z"',
     datetime.datetime(2026, 1, 31, 10, tzinfo=datetime.timezone.utc)),
    (datetime.date, '"2026-01-31"', datetime.date(2026, 1, 31)),
    (datetime.time, '"10:30:00Z"', datetime.time(10, 30, tzinfo=datetime.timezone.utc)),
    (uuid.UUID, '"00000000-0000-0000-0000-000000000001"', uuid.UUID(int=1)),
    (pathlib.Path, '"a/b"', pathlib.Path("a/b")),
    (Annotated[int, "how many"], "5", 5),
    (Annotated[int, Field(gt=3)], "5", 5),
    (TypeAdapter(list[int]), "[1]", [1]),
    (City, '{"name": "Rome", "population": 3, "sights": [{"name": "Forum"}]}',
     City("Rome", 3, sights=[Sight("Forum")])),
    (Person, '{"name": "Ann"}', {"name": "Ann"}),
    (Point, '{"x": 1}', Point(1.0)),
    (Branch, '{"name": "a", "branches": [{"name": "b"}]}', Branch("a", [Branch("b")])),
    (Town, '{"name": "Rome", "population": 3}', Town(name="Rome", population=3)),
    (list[Town], '[{"name": "Rome", "population": 3}]', [Town(name="Rome", population=3)]),
    (Cat | Dog, '{"kind": "dog", "tricks": ["sit"]}', Dog("dog", ["sit"])),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text", "expected"), READ, ids=lambda value: str(value)[:40])
def test_an_answer_becomes_an_object_of_its_type(given: Any, text: str, expected: Any):
    found = Schema.of(given).parse(text)
    assert (found, type(found)) == (expected, type(expected))


WRONG: list[tuple[Any, str, str]] = [
    (City, "{", "the answer is no JSON: "),
    (City, "[" * 100_000, "the answer is nested too deeply to be read"),
    (City, "[]", "the answer must be an object, got []"),
    (City, '{"name": "Rome"}', "`population` is missing"),
    (City, '{"name": 5, "population": 3}', "`name` must be a string, got 5"),
    (City, '{"name": "a", "population": true}', "`population` must be a whole number, got true"),
    (City, '{"name": "a", "population": 3, "mood": "so so"}',
     '`mood` must be one of "good", "bad", got "so so"'),
    (City, '{"name": "a", "population": 3, "sights": [{"name": "b"}, {}]}',
     "`sights[1].name` is missing"),
    (City, '{"name": "a", "population": 3, "size": 1}',
     "`size` is no field here; there are `name`, `population`, `mood`, `sights`"),
    (int | str, "[]", "the answer must be a whole number or a string, got []"),
    (Cat | Dog, '{"kind": "dog", "tricks": 5}', "`tricks` must be a list, got 5"),
    (float, "1e999", "the answer must be a number that fits a float, got Infinity"),
    (float, "NaN", "the answer is no JSON: NaN is no number of JSON"),
    (datetime.date, '"soon"', 'the answer must be a date like 2026-01-31, got "soon"'),
    (tuple[int, str], "[1]", "the answer must have 2 items, got 1"),
    (set[Any], "[[]]", "the answer cannot be made: unhashable type: 'list'"),
    (Town, '{"name": "Rome"}', "`population` is missing"),
    (list[Town], '[{"name": "Rome", "population": -3}]',
     "`[0].population` was refused: Input should be greater than or equal to 0"),
    (["yes", "no"], "maybe", 'the answer must be one of "yes", "no", got "maybe"'),
    ({"enum": [1]}, "2", "the answer must be 1, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_answer_is_refused_by_the_name_of_the_field(given: Any, text: str, message: str):
    with pytest.raises(ValueError) as caught:
        Schema.of(given).parse(text)
    assert str(caught.value).startswith(message)


def test_what_a_class_refuses_is_told():
    @dataclass
    class Even:
        number: int

        def __post_init__(self) -> None:
            if self.number % 2:
                raise ValueError(f"{self.number} is odd")

    with pytest.raises(ValueError, match="the answer was refused: 3 is odd"):
        Schema.of(Even).parse('{"number": 3}')


CHOICES: list[tuple[Any, str, dict[str, Any]]] = [
    (["yes", "no"], "yes|no", {"yes": "yes", " no\n": "no"}),
    (Literal["yes", "no"], "yes|no", {"yes": "yes"}),
    (Literal[1, True, None, "a.b"], r"1|true|null|a\.b", {"1": 1, "null": None, "a.b": "a.b"}),
    (Mood, "good|bad", {"bad": Mood.BAD}),
    (Level, "1|2", {"2": Level.HIGH}),
    (("a+b (c)", "x/y-z é"), r"a\+b \(c\)|x\/y\-z é", {"a+b (c)": "a+b (c)"}),
]


@pytest.mark.parametrize(("given", "regex", "answers"), CHOICES, ids=lambda value: str(value)[:40])
def test_choices_are_texts_that_stand_for_objects(given: Any, regex: str, answers: dict[str, Any]):
    schema = Schema.of(given)
    assert schema.constraint == {"syntax": "regex", "text": regex}
    assert schema.json_schema is None
    for text, expected in answers.items():
        assert schema.parse(text) is expected


@pytest.mark.parametrize(
    ("given", "constraint"),
    [
        ({"regex": "[a-z]+"}, {"syntax": "regex", "text": "[a-z]+"}),
        ({"lark": 'start: "a"'}, {"syntax": "lark", "text": 'start: "a"'}),
        ({"grammar": 'root ::= "a"'}, {"syntax": "gbnf", "text": 'root ::= "a"'}),
    ],
)
def test_a_regex_or_a_grammar_describes_a_text(given: dict[str, str], constraint: dict[str, str]):
    schema = Schema.of(given)
    assert (schema.constraint, schema.json_schema) == (constraint, None)
    assert (schema.parse("abc"), schema.parse_partial("ab")) == ("abc", "ab")


def untold(position: complex) -> None: ...


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (complex, "`schema` cannot be made of the type `complex`"),
        (list[complex], "`schema` cannot be made of the type `complex`"),
        (dict[int, str], "`schema` cannot be made of the type `int`.*keys of JSON are strings"),
        (Literal[b"a"], "`schema` cannot be made of the type"),
        (Callable, "`schema` cannot be made of the type"),
        (untold, "`schema` cannot be made of the type"),
        ([complex], "`schema` must be a type or a list of texts"),
        ([], "`schema` must be a type or a list of texts"),
        (["a", "a"], "must be different texts"),
        (["a", " "], "must be different texts"),
        (Literal["1", 1], "must be different texts"),
        ("City", "`schema` must be a type, a list of texts or a JSON schema"),
        (None, "`schema` must be a type, a list of texts or a JSON schema"),
        ({"regex": 5}, "`schema` must have a text as `regex`, got 5"),
        ({"regex": ""}, "`schema` must have a text as `regex`"),
        ({"type": object()}, "`schema` must be a JSON schema, and this dict is no JSON"),
        ({"minimum": float("nan")}, "`schema` must be a JSON schema, and this dict is no JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_has_no_schema_is_refused(given: Any, message: str):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Schema.of(given)
    assert caught.value.name == "schema"


def test_a_field_without_a_schema_is_refused_by_name():
    @dataclass
    class Wave:
        phase: complex

    with pytest.raises(InvalidRequestError, match=r"type `complex` \(at `Wave\.phase`\)"):
        Schema.of(Wave)


def test_hints_that_cannot_be_found_are_refused_by_name():
    class Lost(TypedDict):
        field: Nowhere  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(InvalidRequestError, match=r"type hints of `Lost` .*Nowhere"):
        Schema.of(Lost)


CHECKED: list[tuple[Any, list[Any], list[tuple[Any, str]]]] = [
    ({"type": ["integer", "null"]}, [1, None, 1.0], [("a", "must be a whole number or null")]),
    ({"const": {"a": 1}}, [{"a": 1}], [({"a": 2}, "must be ")]),
    ({"enum": [1, "a"]}, [1, 1.0, "a"], [(True, 'must be one of 1, "a"')]),
    ({"minimum": 1, "exclusiveMaximum": 3}, [1, 2.9, "a"], [(0, "at least 1"), (3, "less than 3")]),
    ({"multipleOf": 0.1}, [0.3, 10**400], [(0.25, "a multiple of 0.1")]),
    ({"minLength": 1, "maxLength": 2}, ["a"], [("", "at least 1 char"), ("abc", "at most 2")]),
    ({"minItems": 1, "items": {"type": "null"}}, [[None]], [([], "at least 1"), ([1], r"\[0\]")]),
    ({"prefixItems": [True, False]}, [[1]], [([1, 2], r"`\[1\]` is not allowed here")]),
    ({"required": ["a"]}, [{"a": 1}, 5], [({}, "`a` is missing")]),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "null"}}},
     [{"a": None}, {"b": 1}], [({"a": 1}, "`a` must be null, got 1")]),
    ({"additionalProperties": False}, [{}], [({"a": 1}, "`a` is no field here; there are none")]),
    ({"additionalProperties": {"type": "null"}}, [{"a": None}], [({"a": 1}, "`a` must be null")]),
    ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1], [(3, "at most 2")]),
    ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, [0, 3], [(1, "fits 2 of the forms")]),
    ({"anyOf": [{"type": "null"}, {"required": ["a"]}]}, [None], [({}, "`a` is missing")]),
    ({"not": {"type": "null"}}, [1], [(None, "must not be null")]),
    ({"$ref": "#/nowhere"}, [], [(1, "the schema has no")]),
    ({"$ref": "https://example.org/a"}, [], [(1, "the schema has no")]),
    ({"$ref": "#"}, [], [(1, "nested too deeply|takes more than")]),
    (True, [1], []),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), CHECKED, ids=lambda value: str(value)[:40])
def test_values_are_checked_against_a_json_schema(
    schema: Any, right: list[Any], wrong: list[tuple[Any, str]]
):
    checked = Schema.of({"properties": {}, "allOf": [schema]} if schema is True else schema)
    for value in right:
        assert checked.parse(json.dumps(value)) == value
    for value, message in wrong:
        with pytest.raises(ValueError, match=message):
            checked.parse(json.dumps(value))


def test_a_schema_whose_alternatives_double_is_given_up():
    levels = {str(n): {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(60)}
    schema = Schema.of({"$ref": "#/$defs/0", "$defs": {**levels, "60": {"type": "null"}}})
    with pytest.raises(ValueError, match="takes more than"):
        schema.parse("5")


@pytest.mark.parametrize(
    ("given", "text", "is_cut_short", "expected"),
    [
        (list[int], "[1]", True, ([1], None)),
        (list[int], "[1", True, (None, "the answer was cut short")),
        (int, "12", True, (None, "the answer was cut short")),
        (int, "12", False, (12, None)),
        (["a", "ab"], "a", True, (None, "the answer was cut short")),
        ({"regex": "a+"}, "aa", True, (None, "the answer was cut short")),
        (City, "{}", False, (None, "`name` is missing")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_answer_comes_to_an_object_or_to_a_reason(
    given: Any, text: str, is_cut_short: bool, expected: Any
):
    assert Schema.of(given).outcome(text, is_cut_short) == expected


def test_whatever_a_class_raises_is_a_reason():
    @dataclass
    class Strict:
        name: str

        def __post_init__(self) -> None:
            raise LookupError(f"who is {self.name.upper()}?")

    schema = Schema.of(Strict)
    assert schema.outcome('{"name": "a"}', False) == (None, "LookupError: who is A?")
    assert schema.parse_partial("{") is None


# ---------------------------------------------------------------- answers that are being written


GROWN: list[tuple[Any, str, Any]] = [
    (City, "", None),
    (City, "{", City(None, None)),  # type: ignore[arg-type]
    (City, '{"name', City(None, None)),  # type: ignore[arg-type]
    (City, '{"name": "Ro', City("Ro", None)),  # type: ignore[arg-type]
    (City, '{"name": "Rome", "population": 28', City("Rome", None)),  # type: ignore[arg-type]
    (City, '{"name": "Rome", "population": 28,', City("Rome", 28)),
    (City, '{"name": "Rome", "population": 28, "mood": "b', City("Rome", 28)),
    (City, '{"name": "R", "population": 1, "sights": [{"name": "F',
     City("R", 1, sights=[Sight("F")])),
    (City, '{"name": 5, "popul', None),
    (City, '{"size": 5, "popul', None),
    (Person, '{"name": "A', {"name": "A"}),
    (Point, '{"x": 1.5,', Point(1.5)),
    (Town, '{"name": "Rome", "twin": {"name": "Pa',
     Town.model_construct(name="Rome", population=None,
                          twin=Town.model_construct(name="Pa", population=None))),
    (list[Town], '[{"name": "Rome", "population": 3}, {"na',
     [Town(name="Rome", population=3), Town.model_construct(name=None, population=None)]),
    (Cat | Dog, '{"kind": "dog", "tricks": ["si', Dog("dog", ["si"])),
    (Branch, '{"name": "a", "branches": [{"name": "b"', Branch("a", [Branch("b")])),
    (dict[str, list[int]], '{"a": [1, 2', {"a": [1]}),
    (dict, '{"a": {"b": "c', {"a": {"b": "c"}}),
    (int, "12", None),
    (bool, "tr", None),
    (str, '"a\\', "a"),
    (str, '"a\\u00e', "a"),
    (str, '"a\\u00e9', "aé"),
    (str, '"a\\ud83d\\ude0', "a"),
    (str, '"a\\ud83d\\ude00', "a😀"),
    (str, '"a\\\\', "a\\"),
    (str, '"a, [b]: {', "a, [b]: {"),
    (datetime.date, '"2026-01-31', None),
    (["yes", "no"], "ye", None),
    (City, "no JSON", None),
    (City, '{"name": oops, "population', None),
    (list, "[" * 100_000, None),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text", "expected"), GROWN, ids=lambda value: str(value)[-40:])
def test_a_beginning_shows_what_is_sure(given: Any, text: str, expected: Any):
    assert Schema.of(given).parse_partial(text) == expected


WRITTEN = json.dumps(
    {
        "name": 'R\\o"m\n😀é',
        "population": -2800000,
        "mood": "bad",
        "sights": [{"name": "Forum, [the]", "year": None}, {"name": "{Arch}", "year": 203}],
    }
)


@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_answer_grows_the_same_in_pieces_of_any_size(
    ensure_ascii: bool, indent: int | None, size: int
):
    text = json.dumps(json.loads(WRITTEN), ensure_ascii=ensure_ascii, indent=indent)
    schema = Schema.of(City)
    growing, last = schema.growing(), City("", 0)
    for at in range(0, len(text), size):
        city = growing.feed(text[at : at + size])
        if city is not None:
            assert city == schema.parse_partial(text[: at + size])
            assert (city.name or "").startswith(last.name or "")
            assert len(city.sights) >= len(last.sights)
            last = city
    assert last == schema.parse(text)


def test_a_long_answer_is_not_made_anew_for_every_piece():
    text = json.dumps([{"name": "a", "population": n} for n in range(4000)])
    growing = Schema.of(list[City]).growing()
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    shown = [one for piece in pieces if (one := growing.feed(piece)) is not None]
    assert len(pieces) > 30_000
    assert len(shown) < 700  # so the time for all of them is that of a hundred whole ones


def test_a_model_with_validators_grows_without_them():
    class Shouted(BaseModel):
        word: str

        @field_validator("word")
        @classmethod
        def must_be_loud(cls, word: str) -> str:
            if not word.isupper():
                raise ValueError("not loud")
            return word

    schema = Schema.of(Shouted)
    assert schema.parse_partial('{"word": "HEY').word == "HEY"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="`word` was refused: Value error, not loud"):
        schema.parse('{"word": "hey"}')
