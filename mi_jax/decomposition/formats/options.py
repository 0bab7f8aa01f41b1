"""What a caller may add to a path when a dictionary is loaded."""

import dataclasses

from mi_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `load`.

    Attributes:
      layer: which of several layers' dictionaries.
      scale: what activations are multiplied with before the dictionary reads them, where the file does not say it.
    """

    layer: int | None = None
    scale: float | None = None

    def none_but(self, *names: str, format: str) -> None:
        """Refuses options that a format has no use for."""
        for option in dataclasses.fields(self):
            if getattr(self, option.name) is not None and option.name not in names:
                raise InputError(f"{option.name}= has no meaning for {format}; leave it out")
