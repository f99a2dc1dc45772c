import copy
import inspect
import pickle

import pytest

from tabagent_model import Model, errors
from tabagent_model.errors import InvalidRequestError, OutOfMemoryError, TabAgentModelError
from tabagent_model.testing import ScriptedContext

ALL = [
    error
    for error in vars(errors).values()
    if inspect.isclass(error) and issubclass(error, TabAgentModelError)
]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickle_and_copy(kind: type[TabAgentModelError]):
    error = kind("`x` needs 3, but 2 is free", hint="lower `n_ctx`", needed=3)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert (str(twin), twin.hint, twin.needed) == (str(error), "lower `n_ctx`", 3)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_is_an_exception_of_the_package_and_named_in_the_tree(
    kind: type[TabAgentModelError],
):
    assert issubclass(kind, RuntimeError)
    assert kind.__doc__
    assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ModelNotFoundError, FileNotFoundError),
        (errors.UnreadableModelError, OSError),
        (errors.InvalidModelError, ValueError),
        (errors.BackendError, ImportError),
        (errors.OutOfMemoryError, MemoryError),
        (errors.InvalidRequestError, ValueError),
        (errors.TokenizationError, ValueError),
        (errors.GenerationTimeoutError, TimeoutError),
    ],
)
def test_errors_are_also_what_one_expects(kind: type[Exception], builtin: type[Exception]):
    assert issubclass(kind, builtin)


def test_a_hint_stands_below_the_message():
    error = OutOfMemoryError("`m` needs 9 GiB, but 6 GiB is free", hint="lower `n_ctx`")
    assert str(error) == "`m` needs 9 GiB, but 6 GiB is free\n\nhint: lower `n_ctx`"
    assert str(OutOfMemoryError("no hint")) == "no hint"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_of_the_engine_arrives_as_it_is(kind: type[TabAgentModelError]):
    with (
        Model(ScriptedContext(["a", kind("told", hint="do this")])) as model,
        pytest.raises(kind, match="told\n\nhint: do this"),
    ):
        model.generate("x")


def test_except_exception_catches_a_refusal():
    try:
        Model(ScriptedContext()).generate("x", temperature="hot")  # type: ignore[call-overload]
    except Exception as error:
        assert isinstance(error, InvalidRequestError)
        assert error.name == "temperature"
