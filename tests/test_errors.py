"""The tree of errors and its codes on the wire."""

from __future__ import annotations

import inspect
import re

import pytest

from ensembler.protocol import errors
from ensembler.protocol.errors import (
    WIRE_ERRORS,
    BusyError,
    EnsemblerError,
    InternalError,
    MissingExtraError,
    ProtocolError,
    ServerError,
    WireError,
    from_wire,
)

CLASSES = {
    name: cls
    for name, cls in vars(errors).items()
    if inspect.isclass(cls) and issubclass(cls, Exception) and cls.__module__ == errors.__name__
}
WITH_CODE = {name: cls for name, cls in CLASSES.items() if "code" in vars(cls)}


def printed_tree():
    """Returns ``{name: (parent's name, code or None)}`` as the module's docstring draws it."""
    tree, path = {}, []
    for line in errors.__doc__.splitlines():
        found = re.match(r"    ([│ ]*(?:[├└]── )?)([A-Z]\w*Error)\b(.*)", line)
        if found:
            branch, name, rest = found.groups()
            path = [*path[: len(branch) // 4], name]
            code = re.search(r" (\d{3})$", rest)
            tree[name] = (path[-2] if len(path) > 1 else "Exception", int(code[1]) if code else None)
    return tree


def test_the_printed_tree_names_every_class_below_its_parent():
    parents = {name: parent for name, (parent, _) in printed_tree().items()}
    assert parents == {name: cls.__bases__[0].__name__ for name, cls in CLASSES.items()}


def test_the_printed_tree_states_the_codes():
    codes = {name: code for name, (_, code) in printed_tree().items() if code is not None}
    assert codes == {name: cls.code for name, cls in WITH_CODE.items()}


def test_one_except_clause_catches_them_all():
    assert all(issubclass(cls, EnsemblerError) for cls in CLASSES.values())


def test_every_class_says_when_it_is_raised():
    assert all(vars(cls).get("__doc__") for cls in CLASSES.values())


def test_wire_codes_are_unique_and_in_their_groups():
    codes = [cls.code for cls in WITH_CODE.values()]
    assert len(set(codes)) == len(codes)
    assert {code // 100 for code in codes} == {1, 2, 3, 4, 5}


def test_every_error_with_a_code_can_travel():
    assert {cls.code: cls for cls in WITH_CODE.values()} == WIRE_ERRORS
    leaves = {cls for cls in CLASSES.values() if issubclass(cls, ProtocolError | ServerError)} - {ServerError}
    assert set(WIRE_ERRORS.values()) == leaves
    assert all(issubclass(cls, WireError) for cls in leaves)


@pytest.mark.parametrize("code", WIRE_ERRORS)
def test_an_error_arrives_as_it_was_sent(code):
    error = from_wire(code, "what happened and what to do", 75.0)
    assert type(error) is WIRE_ERRORS[code]
    assert error.code == code
    assert str(error) == "what happened and what to do"


def test_busy_carries_when_to_try_again():
    assert from_wire(301, "full", 75.0).retry_after_ms == 75.0
    assert BusyError("full").retry_after_ms > 0


@pytest.mark.parametrize("code", [0, -1, 100, 199, 999, 2**63])
def test_an_unknown_code_is_an_internal_error_that_names_it(code):
    error = from_wire(code, "from a later version", 0.0)
    assert type(error) is InternalError
    assert str(code) in str(error)
    assert "from a later version" in str(error)


def test_a_missing_extra_names_its_install_command():
    assert str(MissingExtraError("pillow", "image", "reading a photo")) == (
        "reading a photo needs pillow: pip install 'ensembler-edge[image]'"
    )
