"""Settings dataclasses from plain values: types are checked here, and all mistakes are collected."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union


def suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(sorted(known))})"


def build(cls: type, values: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """A settings dataclass from plain values; types are checked where they are used, here."""
    hints = typing.get_type_hints(cls)
    good: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            problems.append(f"{where}: unknown setting {key!r}{suggest(key, list(hints))}")
            continue
        try:
            good[key] = _coerce(value, hints[key])
        except ValueError as error:
            problems.append(f"{where}: {key} = {value!r}: {error}")
    try:
        return cls(**good)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return cls()


def _coerce(value: Any, kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for arg in args:
            if arg is type(None):
                continue
            try:
                return _coerce(value, arg)
            except ValueError:
                pass
        raise ValueError(f"must be {' or '.join(_spell(a) for a in args)}")
    if origin is Literal:
        if value not in args:
            raise ValueError(f"must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        return tuple([value] if isinstance(value, str) else value or ())
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-3 as text
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        # YAML reads 2:4 as a base-60 number: 2·60 + 4
        return f"{value // 60}:{value % 60}" if value >= 60 else str(value)
    if kind in (int, bool, str) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"must be {_spell(kind)}")


def _spell(kind: Any) -> str:
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "nothing"}.get(
        kind, str(kind)
    )
