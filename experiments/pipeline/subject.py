"""The model under study, its tokenizer, and what a stage returns."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mi_jax.data import Tokenizer, tokenizer_from_gguf
from mi_jax.models import GGUF, Decoder, load_gguf, open_gguf, smollm2_path


@dataclasses.dataclass(frozen=True)
class Subject:
    """A language model with its tokenizer and the file that both come from."""

    model: Decoder
    tokenizer: Tokenizer
    file: GGUF


def load_subject(path: str = "") -> Subject:
    """Loads a GGUF file; the default is SmolLM2-135M-Instruct.

    Raises:
      CheckpointError: the file is missing, damaged or of another architecture.
    """
    file = open_gguf(path or smollm2_path())
    return Subject(load_gguf(file), tokenizer_from_gguf(file), file)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage found.

    Attributes:
      results: flat figures for results.json.
      figures: what the report draws.
      arrays: what later stages read, by name.
    """

    results: Mapping[str, Any]
    figures: Mapping[str, Any]
    arrays: Mapping[str, Any] = dataclasses.field(default_factory=dict)
