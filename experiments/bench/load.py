"""How long loading a checkpoint takes, and how much memory: one measurement, in a process of its own.

    python load.py PATH [--cache FOLDER] [--tokens 16]

One JSON object is printed. `first_logits_seconds` counts from the start of loading: it has the loading, the compilation
of the forward and one prompt of `--tokens` tokens. `rss_bytes` is by how much the resident memory, at its largest while
loading, exceeds that of the process before, with the libraries imported and the backend started; None where the system
does not say (it does on Linux). With `--cache`, compiled programs are kept in that folder and taken from it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak() -> int | None:
    """Sets the record of the largest resident memory to the present one and returns that, in bytes."""
    if not _CLEAR.exists():
        return None
    _CLEAR.write_text("5")
    return peak()


def peak() -> int:
    """The largest resident memory since `reset_peak`, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Loads once, runs once, and prints what the module's docstring names."""
    parser = argparse.ArgumentParser(description="Measures loading a checkpoint.")
    parser.add_argument("path", help="directory in Hugging Face's format, or GGUF file")
    parser.add_argument("--cache", help="folder of the compilation cache")
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()

    start = time.perf_counter()
    import jax
    import jax.numpy as jnp

    import mi_jax as mi
    from mi_jax.models.checkpoints.huggingface import load
    from mi_jax.run import enable_compilation_cache

    if arguments.cache:
        enable_compilation_cache(arguments.cache)
    else:
        jax.config.update("jax_enable_compilation_cache", False)
    tokens = jax.block_until_ready(jnp.ones((1, arguments.tokens), jnp.int32))
    importing = time.perf_counter() - start

    before = reset_peak()
    start = time.perf_counter()
    model = jax.block_until_ready(load(arguments.path, dtype=jnp.float32))
    loading = time.perf_counter() - start
    above = None if before is None else peak() - before
    jax.block_until_ready(mi.jit(model)(tokens))
    measured = {
        "import_seconds": importing,
        "load_seconds": loading,
        "first_logits_seconds": time.perf_counter() - start,
        "rss_bytes": above,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
    }
    json.dump(measured, sys.stdout)


if __name__ == "__main__":
    main()
