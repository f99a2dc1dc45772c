"""The promises: which names there are, and that a script can stand in for the engine."""

import ast
import inspect
from pathlib import Path

import pytest

import tabagent_model
from tabagent_model import AsyncModel, Model, errors
from tabagent_model.testing import ScriptedContext, ScriptedEvent

STUB = ast.parse((Path(tabagent_model.__file__).parent / "_core.pyi").read_text())


def members_of(name: str) -> dict[str, ast.FunctionDef]:
    """The public methods and properties of a class in the stub."""
    (found,) = [n for n in STUB.body if isinstance(n, ast.ClassDef) and n.name == name]
    functions = [n for n in found.body if isinstance(n, ast.FunctionDef)]
    return {n.name: n for n in functions if not n.name.startswith("_")}


def test_the_public_names_are_there_and_are_all():
    for name in tabagent_model.__all__:
        assert getattr(tabagent_model, name) is not None
    assert list(tabagent_model.__all__) == sorted(tabagent_model.__all__)
    kinds = [value for value in vars(errors).values() if inspect.isclass(value)]
    named = {kind.__name__ for kind in kinds if issubclass(kind, errors.TabAgentModelError)}
    assert named <= set(tabagent_model.__all__)


@pytest.mark.parametrize("name", members_of("PyContext"))
def test_the_script_has_the_methods_of_the_context(name: str):
    wanted = members_of("PyContext")[name]
    is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in wanted.decorator_list)
    found = getattr(ScriptedContext(), name)
    assert callable(found) != is_property
    if not is_property:
        arguments = inspect.signature(found).parameters.values()
        named = [a for a in arguments if a.kind is not a.VAR_KEYWORD]
        assert [a.name for a in named] == [
            a.arg for a in wanted.args.args[1:] + wanted.args.kwonlyargs
        ]
        defaults = [a.default for a in named if a.default is not a.empty]
        written = [*wanted.args.defaults, *filter(None, wanted.args.kw_defaults)]
        assert defaults == [ast.literal_eval(default) for default in written]


def test_the_script_tells_events_like_the_context():
    assert sorted(ScriptedEvent.__dataclass_fields__) == sorted(members_of("Event"))


def test_both_faces_have_the_same_methods_with_the_same_arguments():
    def methods(kind: type) -> dict[str, list[str]]:
        found = {n: m for n, m in vars(kind).items() if not n.startswith("_")}
        return {n: list(inspect.signature(getattr(kind, n)).parameters) for n in found}

    assert methods(Model) == methods(AsyncModel)


@pytest.mark.parametrize("kind", [Model, AsyncModel])
def test_every_public_method_says_what_it_does_or_has_a_telling_name(kind: type):
    telling = {"close", "tokenize", "detokenize", "context_length", "load_time_ms", "is_loaded"}
    for name, member in inspect.getmembers(kind):
        if not name.startswith("_") and name not in telling:
            assert member.__doc__, name
