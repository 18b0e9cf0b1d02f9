"""A config node that names a function in `_target_`: its annotated signature is the schema, its errors are its own."""

import inspect
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate


def call(node: Any) -> Any:
    """What the node's function returns, or the function itself with the node's options (`_partial_`); null is None."""
    try:
        return instantiate(node)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def binds(group: str, node: Any, given: tuple[str, ...]) -> list[str]:
    """What keeps the options of an open group from being the arguments of its function."""
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        return [f"{group} must name its function in _target_, found {node!r}; choose an option: {group}=..."]
    try:
        target = get_object(node["_target_"])
        parameters = inspect.signature(target, eval_str=True).parameters
    except Exception as error:  # whatever importing that module raises
        return [f"{group}._target_ must name a function, got {node['_target_']}: {error}"]
    options = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    expected = [name for name in parameters if name not in given]
    problems = [
        f"{group}.{name} is not an option of {node['_target_']}, which has {', '.join(expected) or 'none'}"
        for name in options
        if name not in expected
    ]
    for name in expected:
        parameter = parameters[name]
        if name not in options:
            if parameter.default is parameter.empty:
                problems.append(f"{group}.{name} must be given for {node['_target_']}; add {group}.{name}=...")
        elif not fits(options[name], parameter.annotation):
            problems.append(f"{group}.{name} must be {kind(parameter.annotation)}, got {options[name]!r}")
    return problems


def kind(annotation: Any) -> str:
    """A type as a reader writes it."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    return inspect.formatannotation(annotation)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value of a config is of a type; a whole number is a float, too."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (inspect.Parameter.empty, Any):
        return True
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is not None:  # list[float], dict[str, int], ...
        if not isinstance(value, origin if isinstance(origin, type) else object) or isinstance(value, str):
            return False
        items: Any = value.values() if isinstance(value, dict) else value
        return not arguments or all(fits(item, arguments[-1]) for item in items)
    if annotation in (None, NoneType):
        return value is None
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    return not isinstance(annotation, type) or isinstance(value, annotation)
