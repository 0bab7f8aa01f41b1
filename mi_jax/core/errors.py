"""The base of errors that a user can mend: the message alone says what was wrong and what to do."""


class InputError(ValueError):
    """Something given from outside, a file, a text or a workdir, cannot be used as it is."""


class NotNative(InputError, AttributeError):
    """What was given is a model with sites, and what is done with it needs the parts of a native decoder."""


def lacks(model: object, name: str) -> object:
    """The `__getattr__` of models with sites that are no native decoder, and so have no `config` or `blocks`.

    Raises:
      NotNative: always, but for private names.
    """
    kind = type(model).__name__
    if name.startswith("_"):
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")
    raise NotNative(
        f"{kind} has no {name!r}: this needs a native decoder, as mi.load gives, not one under mi.intervene or "
        "mi.capture and not a foreign model behind an adapter. Give the decoder itself; edits go with forward passes, "
        "sweeps and generate"
    )
