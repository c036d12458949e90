# SPDX-License-Identifier: Apache-2.0
"""Patterns as plain data and back: the class's name and its fields, nothing else.

>>> describe(AShape(sink=4, window=1024))
{'type': 'AShape', 'sink': 4, 'window': 1024, 'dense_tail': 0}

There is no list of patterns here: every frozen dataclass that `sparse_attn.patterns` exports is
known, and so is every pattern class that a program defines itself, once it is imported.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from sparse_attn import patterns
from sparse_attn.patterns import AShape, Pattern, PerHead, presets

__all__ = ["AShape", "describe", "pattern_schema", "pattern_types", "undescribe"]

_SCALARS: dict[Any, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    type(None): "null",
}


def _subclasses(base: type) -> list[type]:
    found: list[type] = []
    direct: list[type] = base.__subclasses__()
    for cls in direct:
        found += [cls, *_subclasses(cls)]
    return found


def pattern_types() -> dict[str, type]:
    """Every dataclass that a description may name, by name; the package's own come first."""
    own = [getattr(patterns, name) for name in patterns.__all__] + [presets.Preset]
    found: dict[str, type] = {}
    for cls in (*own, *_subclasses(Pattern)):
        if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or cls is PerHead:
            continue
        if not cls.__name__.startswith("_"):
            found.setdefault(cls.__name__, cls)
    return found


def describe(pattern: Any) -> dict[str, Any]:
    """A pattern as a dict of numbers, strings, lists and dicts.

    Args:
        pattern: a frozen dataclass whose fields are of these kinds.

    Raises:
        TypeError: it has a memory, or holds tensors or functions.
    """
    cls: type[Any] = type(pattern)
    if pattern_types().get(cls.__name__) is not cls:
        raise TypeError(
            f"sparse_attn.heads: a {cls.__name__} cannot be written down; only frozen dataclasses "
            "can (a state's pattern, the members of a PerHead)."
        )
    described: dict[str, Any] = {"type": cls.__name__}
    for field in dataclasses.fields(cls):
        described[field.name] = _plain(getattr(pattern, field.name), f"{cls.__name__}.{field.name}")
    return described


def _plain(value: object, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(member, where) for member in value]
    if pattern_types().get(type(value).__name__) is type(value):
        return describe(value)
    raise TypeError(
        f"sparse_attn.heads: {where} is a {type(value).__name__}, which a plan cannot hold; it "
        "holds numbers, strings and patterns of these."
    )


def undescribe(data: object) -> Pattern:
    """The pattern that `describe` made `data` from; fields that are left out take their defaults.

    Raises:
        ValueError: it is no description; the text says what is allowed.

    Example:
        >>> undescribe({"type": "AShape", "sink": 64, "window": 256})
        AShape(sink=64, window=256, dense_tail=0)
    """
    made = _made(data)
    if not isinstance(made, Pattern):
        raise ValueError(f"a {type(made).__name__} is not a pattern, only a part of one")
    return made


def _made(data: object) -> object:
    if isinstance(data, list):
        return tuple(_made(member) for member in data)
    if not isinstance(data, dict):
        return data
    known = pattern_types()
    name = data.get("type")
    if name not in known:
        raise ValueError(f"type={name!r} is unknown; known are {', '.join(sorted(known))}")
    fields = {field.name: field for field in dataclasses.fields(known[name])}
    given = {key: value for key, value in data.items() if key != "type"}
    extra = [key for key in given if key not in fields]
    if extra:
        raise ValueError(
            f"{name} has no field {', '.join(map(repr, extra))}; it has "
            f"{', '.join(fields) or 'none'}"
        )
    missing = [key for key, field in fields.items() if _is_required(field) and key not in given]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
    try:
        return known[name](**{key: _made(value) for key, value in given.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


# ------------------------------------------------------------------------------ the JSON Schema


def pattern_schema() -> dict[str, Any]:
    """JSON Schemas of the package's own classes, by name, for `$defs`.

    Classes with a field that JSON cannot hold (a function) are left out; of a field that may also
    be None, that part remains.
    """
    known = {n: c for n, c in pattern_types().items() if c.__module__.startswith("sparse_attn.")}
    while True:
        schemas = {name: _class_schema(name, cls, known) for name, cls in sorted(known.items())}
        holds = {name: cls for name, cls in known.items() if schemas[name] is not None}
        if holds == known:  # no class refers to one that is left out
            return {name: schema for name, schema in schemas.items() if schema is not None}
        known = holds


def _class_schema(name: str, cls: type, known: dict[str, type]) -> dict[str, Any] | None:
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    properties = {field.name: _schema_of(hints[field.name], known) for field in fields}
    if not all(properties.values()):
        return None
    return {
        "type": "object",
        "properties": {"type": {"const": name}, **properties},
        "required": ["type", *(field.name for field in fields if _is_required(field))],
        "additionalProperties": False,
    }


def _schema_of(hint: Any, known: dict[str, type]) -> dict[str, Any] | None:
    """The schema of one type; None if JSON has nothing like it."""
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [part for m in members if (part := _schema_of(m, known)) is not None]
        return parts[0] if len(parts) == 1 else {"anyOf": parts} if parts else None
    if origin is typing.Literal:
        return {"enum": list(members)}
    if origin is tuple and len(members) == 2 and members[1] is Ellipsis:
        item = _schema_of(members[0], known)
        return None if item is None else {"type": "array", "items": item}
    if hint is Pattern:
        return {"$ref": "#/$defs/pattern"}
    if isinstance(hint, type) and known.get(hint.__name__) is hint:
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return None
