"""Type hints as the schema of a config: does a plain value fit, and how is a type called in a message?"""

import functools
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Node:
    """The type of a part in the schema: an open map that carries `_target_`."""


def fits(value: Any, hint: Any) -> bool:
    """Does a plain value fit a type? Types that no config can write (modules, callables) are left to the target."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if hint is Any:
        return True
    if hint is Node:
        return isinstance(value, Mapping) and "_target_" in value
    if hint in (None, type(None)):
        return value is None
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int or hint is float:
        number = int if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence, Iterable):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value if arguments)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(item, arguments[1]) for item in value.values())
    if inspect.isclass(hint):
        return value is not None and not isinstance(value, bool | int | float | str)
    return True


@functools.cache
def hints_of(owner: Any) -> dict[str, Any]:
    """Return the types of a function's parameters by name; none where they cannot be known."""
    try:
        return typing.get_type_hints(owner)
    except (NameError, TypeError):  # a name that exists for type checkers only; the target checks its values itself
        return {}


def hint_name(hint: Any) -> str:
    """Return what a message calls a type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(hint_name(each) for each in arguments)
    if arguments:
        container = str(hint).partition("[")[0].rpartition(".")[2]
        return f"{container} of {' to '.join(hint_name(each) for each in arguments)}"
    names = {Node: "a part with a '_target_'", type(None): "null", Any: "anything"}
    return names.get(hint) or getattr(hint, "__name__", str(hint))
