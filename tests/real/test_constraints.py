"""Answers that have to be something: JSON of a schema, a regular expression, a grammar.

The fault cases S08 to S18: what is written wrongly is refused at the call, with the place, and the
next answer is as always.
"""

from __future__ import annotations

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from schemas import random_schema
from tabagent_model import (
    AsyncModel,
    Completion,
    GenerationConfig,
    GrammarError,
    InvalidRequestError,
    Model,
    PyContext,
    SamplingError,
)
from tabagent_model.params import BUNDLED_MODEL

pytestmark = pytest.mark.model

PROMPT = "Once upon a time"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def the_next_answer_is_as_always(tiny_model: Model):
    before = tiny_model.generate(PROMPT, max_tokens=8, temperature=0)
    yield
    assert tiny_model.generate(PROMPT, max_tokens=8, temperature=0) == before


def size_of(model: Model) -> int:
    return int(model.info()["vocab_size"])


def checked(answer: Completion, schema: Any) -> bool:
    """Whether the answer is whole; then it is JSON of the schema."""
    if answer.finish_reason == "length":
        return False
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())
    return True


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1, "seed": 3}], ids=repr)
def test_an_answer_is_json_of_its_schema(tiny_model: Model, fields: dict[str, Any]):
    given = [PERSON, json.dumps(PERSON)]
    first, second = [
        tiny_model.generate(PROMPT, json_schema=schema, max_tokens=120, **fields)
        for schema in given
    ]
    assert first == second
    assert checked(first, PERSON)


def test_every_whole_answer_of_random_schemas_validates(tiny_model: Model, num_schemas: int):
    dice = random.Random(5)
    schemas = [random_schema(dice) for _ in range(num_schemas)]

    def ask(number: int) -> Completion | None:
        fields = {"temperature": 1, "top_k": 0, "top_p": 1, "seed": number, "max_tokens": 80}
        try:
            return tiny_model.generate("JSON:", json_schema=schemas[number], **fields)
        except GrammarError as error:
            # What can be satisfied by nothing is refused, and so is what llguidance does not know.
            assert re.search("nsatisfiable|not disjoint|not supported|nimplemented", str(error))
            return None

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(num_schemas)))
    pairs = [(answer, of) for answer, of in zip(answers, schemas, strict=True) if answer]
    whole = [checked(answer, schema) for answer, schema in pairs]
    assert len(pairs) > 0.95 * num_schemas
    assert sum(whole) > 0.4 * num_schemas


@pytest.mark.parametrize(
    ("field", "text", "pattern"),
    [
        ("regex", r"[0-9]{4}-[0-9]{2}", r"[0-9]{4}-[0-9]{2}"),
        ("regex", "(yes|no)!?", "(yes|no)!?"),
        (
            "lark",
            'start: "<" NAME ("," NAME)* ">"\nNAME: /[a-z]{1,3}/',
            r"<[a-z]{1,3}(,[a-z]{1,3})*>",
        ),
        (
            "grammar",
            'root ::= word (" " word){2}\nword ::= [a-z]{1,4}',
            r"[a-z]{1,4}( [a-z]{1,4}){2}",
        ),
        ("grammar", 'root ::= "é" [^a-z]{3}', "é[^a-z]{3}"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_is_what_it_has_to_be(
    tiny_model: Model, field: str, text: str, pattern: str, temperature: float
):
    fields: dict[str, Any] = {"temperature": temperature, "seed": 11, "max_tokens": 60, field: text}
    answer = tiny_model.generate(PROMPT, **fields)
    assert answer == tiny_model.generate(PROMPT, **fields)
    if answer.finish_reason == "stop":
        assert re.fullmatch(pattern, answer.text)
    else:
        assert field == "lark"  # the only one without an end


def test_the_best_token_that_is_allowed_comes_at_temperature_0(tiny_model: Model):
    best: list[int] = []

    def watch(tokens: list[int], logits: memoryview[float]) -> None:
        ids = [token for token in range(len(logits)) if texts[token] in ("a", "b", "ab")]
        best.append(max(ids, key=lambda token: logits[token]))

    texts = [tiny_model.detokenize([token]) for token in range(size_of(tiny_model))]
    answer = tiny_model.generate(
        PROMPT, regex="a|b|ab", temperature=0, repeat_penalty=1, logits_hook=watch
    )
    assert answer.tokens[0] == best[0]


def test_many_at_once_are_as_one_alone(tiny_model: Model):
    fields: dict[str, Any] = {"max_tokens": 60, "temperature": 0}
    asked: list[dict[str, Any]] = [
        {"json_schema": PERSON},
        {},
        {"regex": "[a-f]{20}"},
        {"grammar": 'root ::= "x"{9} | [^x]+'},
    ]
    alone = [tiny_model.generate(PROMPT, **fields, **each) for each in asked]
    with ThreadPoolExecutor(8) as pool:
        crowd = list(
            pool.map(lambda each: tiny_model.generate(PROMPT, **fields, **each), asked * 3)
        )
    assert crowd == alone * 3


def test_several_answers_to_one_prompt_all_keep_it(tiny_model: Model):
    answers = tiny_model.generate(
        PROMPT, n=5, seed=1, temperature=1, json_schema=PERSON, max_tokens=150
    )
    assert len({answer.text for answer in answers}) > 1
    assert any([checked(answer, PERSON) for answer in answers])


def test_who_gives_up_a_place_goes_on_where_the_grammar_was(tiny_model: Model):
    with Model.load(n_ctx=256, max_parallel=1, n_threads=1) as model:
        fields: dict[str, Any] = {"temperature": 0, "regex": "[a-z]{8}-[0-9]{8}-[A-Z]{8}"}
        alone = model.generate(PROMPT, **fields, max_tokens=60)
        slow = model.stream(PROMPT, **fields, max_tokens=60, priority="low")
        next(slow)
        model.generate("hurry", max_tokens=3, priority="high")
        assert slow.collect() == alone
        assert model.metrics()["preemptions"] > 0


def test_the_context_may_overflow_on_the_way(tiny_model: Model):
    with Model.load(n_ctx=64, max_parallel=1, n_threads=1) as model:
        answer = model.generate(
            PROMPT, regex="([a-z]{5},){40}", max_tokens=-1, overflow="shift", temperature=0
        )
    assert answer.finish_reason == "stop"
    assert re.fullmatch("([a-z]{5},){40}", answer.text)


def test_an_answer_is_told_with_its_logprobs(tiny_model: Model):
    answer = tiny_model.generate(PROMPT, regex="(no|yes){2}", logprobs=2, temperature=0)
    assert answer.logprobs is not None
    assert "".join(one.text for one in answer.logprobs) == answer.text
    assert all(one.logprob <= 0 for one in answer.logprobs)


def test_stop_strings_and_the_limit_end_an_answer_before_it_is_whole(tiny_model: Model):
    cut = tiny_model.generate(PROMPT, json_schema=PERSON, stop=['"name"'])
    assert (cut.finish_reason, cut.stop) == ("stop", '"name"')
    assert '"name"' not in cut.text
    short = tiny_model.generate(PROMPT, json_schema={"type": "object"}, max_tokens=1)  # S17
    assert short.finish_reason == "length"
    assert short.text.startswith("{")


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 50}, {}], ids=repr)
def test_a_grammar_that_is_satisfied_ends_the_answer(
    tiny_model: Model, fields: dict[str, Any]
):  # S15
    for field in ({"grammar": 'root ::= "once"'}, {"regex": "once"}, {"json_schema": {"const": 1}}):
        answer = tiny_model.generate(PROMPT, **field, **fields)
        assert answer.finish_reason == "stop"
        assert answer.text in ("once", "1")


async def test_streams_and_sessions_keep_it_too(tiny_model: Model):
    with tiny_model.stream(PROMPT, json_schema=PERSON, temperature=0) as pieces:
        text = "".join(pieces)
    assert text == tiny_model.generate(PROMPT, json_schema=PERSON, temperature=0).text
    session = tiny_model.session()
    assert session.send("Yes or no?", regex="(yes|no)").text in ("yes", "no")
    assert tiny_model.chat([{"role": "user", "content": "1 or 2?"}], regex="[12]").text in (
        "1",
        "2",
    )
    async with await AsyncModel.load(n_ctx=256) as model:
        assert (await model.generate(PROMPT, grammar='root ::= "ja" | "nein"')).text in (
            "ja",
            "nein",
        )


REFUSED: list[tuple[str, str, Any, tuple[int, int] | None]] = [
    ("S08", "grammar", "", (1, 1)),
    ("S08", "grammar", "root ::= ", None),
    ("S08", "grammar", 'root ::= "a" |\n  b', (2, 3)),
    ("S08", "grammar", 'start ::= "a"', (1, 14)),
    ("S08", "grammar", 'root ::= "a', (1, 12)),
    ("S08", "grammar", '\ufeffroot ::= "a"', (1, 1)),
    ("S08", "lark", "start: (", None),
    ("S08", "regex", "[a", (1, 1)),
    ("S09", "grammar", 'root ::= root "a" | "b"', (1, 1)),
    ("S09", "grammar", 'root ::= a\na ::= b\nb ::= c\nc ::= a "x" | "y"', (1, 10)),
    ("S10", "grammar", "root ::= " + "(" * 60_000, (1, 111)),
    ("S10", "json_schema", '{"items":' * 60_000 + "{}" + "}" * 60_000, None),
    ("S10", "json_schema", '{"items":' * 100 + "{}" + "}" * 100, None),
    ("S12", "grammar", 'root ::= "a"{2,1}', (1, 13)),
    ("S12", "grammar", 'root ::= "a"{5000}', (1, 13)),
    ("S12", "grammar", 'root ::= "a"{99999999999999999999}', (1, 14)),
    ("S13", "json_schema", {"type": "string", "minLength": 5, "maxLength": 2}, None),
    ("S13", "json_schema", {"type": "array", "minItems": 5, "maxItems": 2}, None),
    ("S13", "json_schema", {"type": "number", "minimum": 5, "maximum": 2}, None),
    ("S13", "json_schema", {"enum": []}, None),
    ("S14", "json_schema", {"$ref": "http://127.0.0.1:9/schema"}, None),
    ("S14", "json_schema", {"type": "string", "pattern": "(?=a)b"}, None),
    ("S14", "json_schema", {"type": "thing"}, None),
    ("S14", "json_schema", False, None),
    ("S14", "json_schema", {"description": "x" * 2**20}, None),
    ("S14", "json_schema", "{", (1, 1)),
]


@pytest.mark.parametrize(
    ("field", "text", "position"),
    [case[1:] for case in REFUSED],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_written_wrongly_is_refused_at_the_call(
    tiny_model: Model, capfd: Any, field: str, text: Any, position: tuple[int, int] | None
):
    if (field, text) == ("grammar", "root ::= "):
        assert tiny_model.generate(PROMPT, grammar=text).text == ""  # nothing is a grammar, too
        return
    with pytest.raises(GrammarError) as refused:
        tiny_model.stream(PROMPT, **{field: text})
    error = refused.value
    assert (error.name, f"`{field}`" in str(error)) == (field, True)
    assert position is None or error.position == position
    assert capfd.readouterr() == ("", "")


def test_a_pair_that_contradicts_itself_is_named(tiny_model: Model):
    schema = {"properties": {"a": {"type": "string", "minLength": 5, "maxLength": 2}}}
    with pytest.raises(GrammarError, match="`minLength` 5 is more than `maxLength` 2"):
        tiny_model.generate(PROMPT, json_schema=schema)


EXPONENTIAL = "root ::= r0\n" + "".join(
    f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"\n' for i in range(40)
)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("grammar", EXPONENTIAL + 'r40 ::= "x"'),  # S11
        ("grammar", 'root ::= "a" root "b" | "a" root "c" | "d"'),
        ("grammar", 'root ::= ("a"*)* [a-z]{0,2000}'),
        ("regex", "(a|a)*(a|aa)*b"),
        ("regex", "(.*a.{14}b)*"),
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"type": "string", "pattern": "^(a+)+$"}),  # S14
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_explodes_elsewhere_is_kept_or_refused(tiny_model: Model, field: str, text: Any):
    fields: dict[str, Any] = {"max_tokens": 24, "temperature": 1, "seed": 5, field: text}
    try:
        assert tiny_model.generate(PROMPT, **fields).finish_reason in ("stop", "length")
    except GrammarError as error:
        assert error.name == field


def test_a_grammar_that_no_token_can_go_on_with_ends_its_request_only(tiny_model: Model):  # S16
    with pytest.raises(GrammarError, match="no token of this model can come next"):
        tiny_model.generate(PROMPT, grammar="root ::= <[5]> [\\x00]")
    ids = range(size_of(tiny_model))
    digits = [token for token in ids if tiny_model.detokenize([token]).isdigit()]
    with pytest.raises(SamplingError, match="no token is left"):
        tiny_model.generate(PROMPT, regex="[0-9]", banned_tokens=digits)


def test_top_k_1_and_greedy_keep_a_grammar(tiny_model: Model):  # S18
    for fields in ({"top_k": 1, "temperature": 1}, {"temperature": 0}, {"mirostat": 2}):
        answer = tiny_model.generate(PROMPT, grammar="root ::= [0-9]{3} | [A-Z]{3}", **fields)
        assert re.fullmatch("[0-9]{3}|[A-Z]{3}", answer.text)


def test_only_one_of_them_can_be_asked_for():
    with pytest.raises(
        InvalidRequestError, match="`json_schema` cannot be kept together with `regex`"
    ):
        GenerationConfig(json_schema={}, regex="a")
    for field in ("regex", "lark", "grammar", "json_schema"):
        with pytest.raises(InvalidRequestError) as refused:
            GenerationConfig(**{field: 5})
        assert refused.value.name == field
    with pytest.raises(InvalidRequestError, match="json_schema"):
        GenerationConfig(json_schema={"const": object()})


def test_a_config_with_a_schema_is_as_any_other():
    config = GenerationConfig(json_schema=PERSON)
    assert config.json_schema == json.dumps(PERSON)
    assert GenerationConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(GenerationConfig(json_schema=PERSON))


@pytest.fixture(scope="module")
def context():
    from tabagent_model import PyModel

    model = PyModel()
    model.load(str(BUNDLED_MODEL))
    context = model.create_context(256, n_threads=1)
    yield context
    context.close()
    model.unload()


def of(context: PyContext, constraint: dict[str, Any], **fields: Any) -> str:
    fields = {"temperature": 0, "repeat_penalty": 1, "max_tokens": 40} | fields
    return context.generate(PROMPT, constraint=constraint, **fields)


def test_a_constraint_begins_behind_a_text(context: PyContext):
    free = context.generate(PROMPT, temperature=0, repeat_penalty=1, max_tokens=40)
    word = free.split()[3]
    begins = free[: free.index(word) + len(word)]
    constraint = {"syntax": "regex", "text": "[0-9]{5}", "after": word}
    assert re.fullmatch(re.escape(begins) + "[0-9]{5}", of(context, constraint))


def test_a_lazy_grammar_waits_for_its_trigger(context: PyContext):
    free = context.generate(PROMPT, temperature=0, repeat_penalty=1, max_tokens=40)
    word = free.split()[3]
    begins = free[: free.index(word)]
    grammar = {"syntax": "gbnf", "text": f'root ::= "{word}" " "? [0-9]{{5}}', "lazy": True}
    for trigger in (
        {"type": "word", "value": word},
        {"type": "pattern", "value": f" ({re.escape(word)})"},
        {"type": "pattern_full", "value": f"[^!]*({re.escape(word)})"},
    ):
        answer = of(context, grammar | {"triggers": [trigger]})
        assert re.fullmatch(re.escape(begins + word) + " ?[0-9]{5}", answer)
    never = grammar | {"triggers": [{"type": "word", "value": "§§§"}]}
    assert of(context, never) == free


@pytest.mark.parametrize(
    ("constraint", "name"),
    [
        (5, "constraint"),
        ({"text": "a"}, "constraint"),
        ({"syntax": "xml", "text": "a"}, "constraint"),
        ({"syntax": "regex", "text": 5}, "text"),
        ({"syntax": "regex", "text": "a", "lazy": True}, "triggers"),
        ({"syntax": "regex", "text": "a", "huh": 1}, "constraint"),
        (
            {"syntax": "regex", "text": "a", "lazy": True, "triggers": [{"type": "no"}]},
            "the type of a trigger",
        ),
        (
            {
                "syntax": "regex",
                "text": "a",
                "lazy": True,
                "triggers": [{"type": "pattern", "value": "("}],
            },
            "triggers",
        ),
        (
            {
                "syntax": "regex",
                "text": "a",
                "lazy": True,
                "triggers": [{"type": "token", "token": 10**6}],
            },
            "triggers[0]",
        ),
    ],
)
def test_a_constraint_that_is_none_is_refused_by_name(
    context: PyContext, constraint: Any, name: str
):
    with pytest.raises(InvalidRequestError) as refused:
        of(context, constraint)
    assert refused.value.name == name


def test_preserved_control_tokens_are_part_of_the_text(context: PyContext):
    name = "<|im_start|>"
    (control,) = context.tokenize(name, add_bos=False, special=True)
    grammar = {"syntax": "gbnf", "text": f'root ::= "a" <[{control}]> "b"'}
    assert of(context, grammar) == "ab"
    assert of(context, grammar, preserved_tokens=[control]) == f"a{name}b"
    spelled = {"syntax": "gbnf", "text": f'root ::= "a" "{name}" "b"'}
    assert of(context, spelled, preserved_tokens=[control]) == f"a{name}b"


def test_the_second_use_of_a_schema_is_not_compiled_again(tiny_model: Model):
    schema = {"type": "array", "items": random_schema(random.Random(1)), "title": str(time.time())}
    answers = [tiny_model.generate(PROMPT, json_schema=schema, seed=4, max_tokens=30) for _ in "ab"]
    assert answers[0] == answers[1]
