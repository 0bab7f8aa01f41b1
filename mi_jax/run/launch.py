"""Starts an experiment from the command line: `--workdir`, `--config.field=value`, one line for a user's mistake."""

import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import app, flags, logging
from ml_collections import config_flags

from mi_jax.core.errors import InputError

Config = TypeVar("Config")


def launch(main: Callable[[Config, str], None], default: Config, *, workdir: str) -> typing.NoReturn:
    """Parses the flags, calls `main(config, workdir)`, and exits.

    Args:
      main: the experiment.
      default: a frozen dataclass, possibly nested; each field is a flag `--config.field`.
      workdir: default of `--workdir`.

    Exits with 2 on a wrong flag and with 1 on an `InputError`, after one line on standard error.
    """
    flags.DEFINE_string("workdir", workdir, "Folder of the run; the same folder resumes it.")
    config = None

    def parse(argv: Sequence[str]) -> list[str]:
        nonlocal config
        try:
            # defining the flag already reads the command line for the fields that are set
            config = config_flags.DEFINE_config_dataclass("config", _thawed(default))
            return flags.FLAGS(argv)
        except (KeyError, TypeError, ValueError, flags.Error) as error:
            names = ", ".join(f"--config.{name}" for name in _field_names(default))
            _exit(2, f"{_message(error)}. The flags are --workdir and {names}")

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _exit(2, f"unexpected argument {argv[1]!r}; settings are given as --config.field=value")
        assert config is not None
        logging.set_verbosity(logging.WARNING)
        try:
            main(_frozen(config.value, default), os.path.expanduser(flags.FLAGS.workdir))
        except InputError as error:
            _exit(1, str(error))

    app.run(run, flags_parser=parse)
    raise SystemExit(0)


def _exit(code: int, message: str) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _message(error: Exception) -> str:
    return str(error.args[0] if error.args else error).rstrip(".")


def _field_names(config: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        names += _field_names(value, f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]
    return names


def _thawed(config: Any) -> Any:
    """A mutable twin of a frozen dataclass: the flags are set on it."""
    hints = typing.get_type_hints(type(config))
    spec = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            twin = _thawed(value)
            spec.append((field.name, type(twin), dataclasses.field(default_factory=lambda twin=twin: twin)))
        else:
            spec.append((field.name, hints[field.name], dataclasses.field(default_factory=lambda value=value: value)))
    name = type(config).__name__
    return dataclasses.make_dataclass(name, spec)()


def _frozen(value: Any, like: Any) -> Any:
    fields = {}
    for field in dataclasses.fields(like):
        old, new = getattr(like, field.name), getattr(value, field.name)
        fields[field.name] = _frozen(new, old) if dataclasses.is_dataclass(old) else new
    return type(like)(**fields)
