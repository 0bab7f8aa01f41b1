"""The project's own form of a checkpoint, for a decoder that is of no known family: its configuration as JSON.

config.json has the model_type "mi_jax" and the fields of `DecoderConfig` under "decoder"; every tensor has the path of
its parameter, with the number of the layer.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import jax

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.checkpoints.plan import path_name
from mi_jax.models.config import DecoderConfig
from mi_jax.models.parameters import abstract_decoder

MODEL_TYPE = "mi_jax"


def to_json(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of any decoder."""
    return {"architectures": ["Decoder"], "model_type": MODEL_TYPE, "decoder": dataclasses.asdict(config)}


def from_json(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration that `to_json` wrote.

    Raises:
      CheckpointError: a field is unknown, missing or of a wrong kind.
    """
    try:
        return _read(DecoderConfig, values.get("decoder"), "decoder")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json of an {MODEL_TYPE} model: {error}") from error


def names(config: DecoderConfig) -> tuple[Stored, ...]:
    """Every parameter under its own path: "blocks.3.attn.q"."""
    entries = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_decoder(config))[0]:
        own = path_name(path)
        stacked = own.startswith("blocks.")
        axes = " ".join(f"axis_{i}" for i in range(leaf.ndim - stacked))
        name = own.replace("blocks.", "blocks.{layer}.", 1) if stacked else own
        entries.append(Stored(own, name, f"{axes} -> {axes}"))
    return tuple(entries)


def _read(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the type that a field is declared to have."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} is {value!r}, not an object")
        hints = typing.get_type_hints(hint)
        if unknown := sorted(set(map(str, value)) - set(hints)):
            raise ValueError(f"{where} has no field {unknown[0]!r}; it was written by another version")
        return hint(**{name: _read(hints[name], each, f"{where}.{name}") for name, each in value.items()})
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _read(next(each for each in typing.get_args(hint) if each is not type(None)), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} is {value!r}, not a list")
        return tuple(_read(typing.get_args(hint)[0], each, where) for each in value)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where} is {value!r}, not one of {', '.join(typing.get_args(hint))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError(f"{where} is {value!r}, not of type {hint}")
    return value
