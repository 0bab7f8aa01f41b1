"""The persistent XLA compilation cache: what was compiled once is loaded the next time a program starts."""

import os
import warnings
from pathlib import Path

import jax


def enable_compilation_cache(path: str | os.PathLike | None = None) -> Path | None:
    """Keeps compiled programs on disk from here on; call it before the first computation.

    Args:
      path: the folder; jax's own setting (`JAX_COMPILATION_CACHE_DIR`) if not given, else
        `$XDG_CACHE_HOME/mi_jax/xla`, by default `~/.cache/mi_jax/xla`. Who may write there can make this program run
        any code, so it is created for its user alone; do not point it at a folder shared with others.

    Returns:
      The folder, or None where it cannot be written: the program then runs the same, compiling each time.
    """
    # jax defines its settings at run time, where a type checker does not see them.
    setting = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    path = path or setting or _default_folder()
    folder = Path(path).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        warnings.warn(f"no compilation cache: {folder} cannot be written; set JAX_COMPILATION_CACHE_DIR", stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default jax keeps only what took a second to compile; a run here is many programs of a few tenths.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mi_jax" / "xla"
