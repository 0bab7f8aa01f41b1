"""What the layouts of all formats are made with: random numbers, files, and equations to go with them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.decomposition.formats.equations import reconstruct

D, F, L, K = 6, 12, 3, 3
# added to every layout's own
SEED = 0


@dataclasses.dataclass(frozen=True)
class Made:
    """A written dictionary: where it is, its equation, and what `load` is to be told beside the path."""

    path: Path
    equation: Callable[[np.ndarray], np.ndarray]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def numbers(seed=0):
    rng = np.random.default_rng(SEED + seed)

    def draw(*shape, low=-1.0):
        return rng.uniform(low, 1.0, shape).astype(np.float32)

    return draw


def weights(draw, n_layers=None):
    lead = () if n_layers is None else (n_layers,)
    return {
        "W_enc": draw(*lead, D, F),
        "b_enc": draw(*lead, F) * 0.3,
        "W_dec": draw(*lead, F, D),
        "b_dec": draw(*lead, D),
    }


def as64(arrays):
    return {name: value.astype(np.float64) for name, value in arrays.items()}


def equation_of(w, keep, centred, skip=0.0):
    return lambda x: reconstruct(x, w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], keep, centred=centred, skip=skip)


def tensors(folder, name, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.ascontiguousarray(value, np.asarray(value).dtype) for key, value in arrays.items()}
    save_file(contiguous, folder / name)


def config(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))
