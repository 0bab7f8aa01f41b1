"""A config as plain JSON, and where two of them differ."""

import dataclasses
import enum
import math
import os
from collections.abc import Mapping
from typing import Any

_ABSENT = "absent"


def config_to_json(config: Any) -> dict[str, Any]:
    """Turns a (nested) config dataclass into what `json` can write; tuples become lists.

    Raises:
      TypeError: `config` is not a dataclass instance or a mapping, or a field holds a value that JSON has no form
        for; the message names the field.
    """
    if not (dataclasses.is_dataclass(config) and not isinstance(config, type)) and not isinstance(config, Mapping):
        raise TypeError(f"a config is a dataclass instance or a mapping, got {type(config).__name__}: {config!r}")
    return _to_json(config, "config")


def differing_fields(
    held: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "config", *, place: str = "in the workdir"
) -> list[str]:
    """One line for each field in which two configs in JSON form differ, with its dotted name and both values."""
    lines = []
    for name in sorted(held.keys() | asked.keys()):
        field = f"{prefix}.{name}"
        old, new = held.get(name, _ABSENT), asked.get(name, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differing_fields(old, new, field, place=place)
        elif old != new or (name in held) != (name in asked):
            lines.append(f"{field}: {old!r} {place}, {new!r} asked for")
    return lines


def _to_json(value: Any, field: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_json(getattr(value, f.name), f"{field}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _to_json(item, f"{field}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{field}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, enum.Enum):
        return _to_json(value.value, field)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{field} is {value}, which JSON has no form for; use None or a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{field} holds a {type(value).__name__}; a config holds numbers, strings, booleans, None, paths, tuples, "
        "lists, mappings and dataclasses of these"
    )
