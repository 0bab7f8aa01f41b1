"""Every test runs on 8 virtual CPU devices, with strict dtypes and ranks, and with shapes checked at run time."""

import os
import sys
import types
from pathlib import Path

if "jax" in sys.modules:
    raise RuntimeError("tests/conftest.py must set XLA_FLAGS before jax is imported, but a plugin has imported it")
# Small tests spend their time in compilation; the cheap code generator halves it and changes no result beyond rounding.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Each worker has its own folder: jax writes an entry in place, so one could read what another is half-way through.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mi_jax" / "xla-tests" / _worker
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# What the tests import from these packages has its annotations checked on every call, an int being a float as PEP 484
# has it. The import hook takes the checker by a dotted name only, hence the module.
_typechecker = types.ModuleType("mi_jax_tests_typechecker")
_typechecker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
sys.modules[_typechecker.__name__] = _typechecker
_import_hook = install_import_hook(["mi_jax", "mi_kernels"], f"{_typechecker.__name__}.check")


@pytest.fixture
def key() -> jax.Array:
    """A typed PRNG key; split it, do not reuse it."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """The 8 virtual devices as data=2, fsdp=2, model=2."""
    return jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "model"))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops the compiled programs of a file after it: thousands of them at once are more than a process can map."""
    yield
    jax.clear_caches()
