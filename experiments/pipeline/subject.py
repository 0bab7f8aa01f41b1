"""The model under study, its tokenizer, and what a stage returns."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

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


def with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """A figure and its interval under the names that results.json uses."""
    return {name: float(value), f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}


def proportion(name: str, hits) -> dict[str, float]:
    """A share with its exact (Clopper–Pearson) 95 % interval."""
    hits = np.asarray(hits, bool)
    interval = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(0.95)
    return with_interval(name, hits.mean(), interval.low, interval.high)


def mean(name: str, values, *, seed: int = 0) -> dict[str, float]:
    """A mean with its bootstrap 95 % interval over the first axis."""
    values = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[draws].reshape(2000, -1).mean(1), [0.025, 0.975])
    return with_interval(name, values.mean(), low, high)
