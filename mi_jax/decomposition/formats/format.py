"""What every format is: how it is recognised, read and written, and what it has no place for."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mi_jax.decomposition.formats.equivalent import Model
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place


@dataclasses.dataclass(frozen=True)
class Format:
    """How one project lays out its dictionaries.

    Attributes:
      title: what it is called.
      files: what it consists of.
      recognises: whether a folder or file is one.
      load: the dictionary in it.
      lacks: what of a dictionary it has no place for; empty where it has place for all.
      write: fills a new folder, or file.
      suffix: how the name of its one file ends; empty for a folder.
    """

    title: str
    files: str
    recognises: Callable[[Place], bool]
    load: Callable[[Place, Options], Model]
    lacks: Callable[[Model], str]
    write: Callable[[str, Model, Mapping[str, Any]], None]
    suffix: str = ""
