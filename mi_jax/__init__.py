"""mi_jax: mechanistic interpretability in JAX. `import mi_jax as mi` gives the verbs; the rest is in the packages.

The packages, and the verbs for whole models (`load`, `save`, `generate`, `adapt_…`), load when they are first used:
`mi.circuits.discover(…)`.
"""

import importlib
from typing import Any

from mi_jax.core import At as At
from mi_jax.core import Edit as Edit
from mi_jax.core import Effects as Effects
from mi_jax.core import Node as Node
from mi_jax.core import SiteError as SiteError
from mi_jax.core import ablate as ablate
from mi_jax.core import add as add
from mi_jax.core import at as at
from mi_jax.core import attribute as attribute
from mi_jax.core import capture as capture
from mi_jax.core import check_sites as check_sites
from mi_jax.core import each as each
from mi_jax.core import forward_effects as forward_effects
from mi_jax.core import intervene as intervene
from mi_jax.core import jit as jit
from mi_jax.core import load_edits as load_edits
from mi_jax.core import named as named
from mi_jax.core import node as node
from mi_jax.core import noise as noise
from mi_jax.core import pairs as pairs
from mi_jax.core import patch as patch
from mi_jax.core import path_patch as path_patch
from mi_jax.core import per_example as per_example
from mi_jax.core import product as product
from mi_jax.core import project_out as project_out
from mi_jax.core import save_edits as save_edits
from mi_jax.core import scale as scale
from mi_jax.core import swap_subspace as swap_subspace
from mi_jax.core import sweep as sweep
from mi_jax.core import transform as transform

_PACKAGES = (
    "core",
    "run",
    "models",
    "data",
    "decomposition",
    "features",
    "circuits",
    "validation",
    "applications",
    "report",
)


_LAZY = {
    "adapt_equinox": "mi_jax.models.adapters",
    "adapt_linen": "mi_jax.models.adapters",
    "adapt_nnx": "mi_jax.models.adapters",
    "load": "mi_jax.models.checkpoints.huggingface",
    "save": "mi_jax.models.checkpoints.saving",
    "generate": "mi_jax.models.generate",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"mi_jax.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"mi_jax has no {name!r}; its packages are {', '.join(_PACKAGES)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_LAZY})
