"""Freed memory is kept: calls that need large temporary arrays cause no page faults after the first."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import jax, jax.numpy as jnp
from mi_jax.run.memory import keep_freed_memory
print(keep_freed_memory() if "keep" in sys.argv else None)
f = jax.jit(lambda x: (jnp.sin(x).reshape(-1, 64) @ jnp.ones((64, 8))).sum())
x = jnp.ones(2**24)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    f(x).block_until_ready()
before = faults()
for _ in range(4):
    f(x).block_until_ready()
print((faults() - before) // 4)
"""


def run(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))} | environment
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=env, capture_output=True, text=True, check=True
    )
    kept, faults = found.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
def test_large_temporary_arrays_are_not_mapped_anew():
    kept, faults = run("keep")
    _, without = run()
    assert kept == "True"
    # 64 MB in pages of 4 kB, or of 2 MB where the system gives huge ones
    assert without > 30
    assert faults < without / 5
    assert run("keep", MALLOC_MMAP_MAX_="65536")[0] == "False"
