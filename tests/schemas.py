"""Random JSON schemas of all the kinds that people write, each with something that satisfies it."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("name", "age", "items", "ort", "größe", "is_open", "x", "tag")
PATTERNS = (r"^[a-z]{2,6}$", r"^\d{3}-\d{2}$", r"^(yes|no|maybe)$", r"^[A-F0-9]+$")
FORMATS = ("date", "email", "uuid", "ipv4")


def random_schema(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = [_string, _string, _integer, _number, _boolean, _null, _choice, _constant]
    if depth < 3:
        kinds += [_object, _object, _object, _array, _array, _any_of, _all_of]
    if depth == 0:
        kinds = [_object, _object, _array, _any_of, _reference, _string, _integer, _choice]
    return dice.choice(kinds)(dice, depth)


def _string(dice: random.Random, _: int) -> dict[str, Any]:
    least = dice.randint(0, 4)
    return dice.choice(
        [
            {"type": "string"},
            {"type": "string", "minLength": least, "maxLength": least + dice.randint(0, 8)},
            {"type": "string", "pattern": dice.choice(PATTERNS)},
            {"type": "string", "format": dice.choice(FORMATS)},
        ]
    )


def _integer(dice: random.Random, _: int) -> dict[str, Any]:
    least = dice.randint(-1000, 1000)
    return dice.choice(
        [
            {"type": "integer"},
            {"type": "integer", "minimum": least, "maximum": least + dice.randint(0, 5000)},
            {"type": "integer", "exclusiveMinimum": least},
            {"type": "integer", "multipleOf": dice.choice([2, 5, 10]), "minimum": 0},
        ]
    )


def _number(dice: random.Random, _: int) -> dict[str, Any]:
    least = dice.randint(-50, 50)
    return dice.choice(
        [
            {"type": "number"},
            {"type": "number", "minimum": least, "maximum": least + 2.5},
            {"type": ["number", "null"]},
        ]
    )


def _boolean(dice: random.Random, _: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(dice: random.Random, _: int) -> dict[str, Any]:
    return {"type": "null"}


def _choice(dice: random.Random, _: int) -> dict[str, Any]:
    return {"enum": dice.sample([1, 2.5, "a", "é\n", True, None, [1, "x"], {"k": []}], 3)}


def _constant(dice: random.Random, _: int) -> dict[str, Any]:
    return {"const": dice.choice(["v1", 7, None, {"a": [True]}])}


def _object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(WORDS, dice.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(dice, depth + 1) for name in names},
        "required": [name for name in names if dice.random() < 0.6],
        "additionalProperties": False,
    }
    if dice.random() < 0.2:
        schema["additionalProperties"] = dice.choice([{"type": "integer"}, {"type": "boolean"}])
    return schema


def _array(dice: random.Random, depth: int) -> dict[str, Any]:
    least = dice.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "items": random_schema(dice, depth + 1)}
    if dice.random() < 0.7:
        schema |= {"minItems": least, "maxItems": least + dice.randint(0, 3)}
    if dice.random() < 0.2:
        schema["prefixItems"] = [random_schema(dice, depth + 1) for _ in range(2)]
    return schema


def _any_of(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(dice, depth + 1) for _ in range(dice.randint(2, 3))]}


def _all_of(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 3 + dice.randint(0, 99)}]}


def _reference(dice: random.Random, depth: int) -> dict[str, Any]:
    node = {
        "type": "object",
        "properties": {
            "value": random_schema(dice, depth + 2),
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
