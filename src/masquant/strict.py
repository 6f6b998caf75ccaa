# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses from plain nested data and back, strictly: unknown keys and wrong types are refused."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, TypeVar

from .errors import RecipeError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as YAML's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {to_plain(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """Dataclass `kind` of a mapping, refusing unknown keys and wrong types."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} must be a mapping, got {data!r}")
    hints = typing.get_type_hints(kind)
    unknown = [str(key) for key in data if key not in hints]
    if unknown:
        raise RecipeError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(hints)}")
    return kind(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        words = [a for a in kinds if typing.get_origin(a) is Literal]
        return _convert(words[0] if words and isinstance(value, str) else kinds[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} must be a mapping, got {value!r}")
        return {_convert(arguments[0], k, where): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError as error:
            known = ", ".join(str(member.value) for member in hint)
            raise RecipeError(f"{where}: unknown {hint.__name__.lower()} {value!r}; known: {known}") from error
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
