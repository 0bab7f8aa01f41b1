"""Other programs, each in a virtual environment of its own, made from the dependencies that its script names."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mi_jax.core.errors import InputError

PEERS = Path(__file__).parent / "peers"
_METADATA = re.compile(r"(?m)^# /// script\s*$\n(?P<content>(^#(| .*)$\n)+?)^# ///$")


class PeerError(InputError):
    """A peer's environment cannot be made, or its script failed."""


def dependencies(script: Path) -> tuple[str, ...]:
    """The dependencies in a script's inline metadata (PEP 723).

    Raises:
      PeerError: the script has no such block.
    """
    match = _METADATA.search(script.read_text())
    if match is None:
        raise PeerError(f"{script.name} has no inline metadata; it starts with '# /// script', see PEP 723")
    text = "".join(line[2:] if line.startswith("# ") else line[1:] for line in match["content"].splitlines(True))
    return tuple(tomllib.loads(text).get("dependencies", ()))


def environment(script: Path) -> Path:
    """Where the script's environment is kept: one for all scripts of equal dependencies, and for each Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mi_jax" / "peers"
    described = "\n".join((sys.version.split()[0], *dependencies(script)))
    return cache / hashlib.sha256(described.encode()).hexdigest()[:12]


def interpreter(script: Path, python: str = "") -> Path:
    """A Python that has the script's dependencies; the first call installs them with pip, in a few minutes.

    Pip's own settings apply: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares Linux the CUDA libraries.

    Args:
      script: a script with inline metadata.
      python: an interpreter to use as it is, instead.

    Raises:
      PeerError: there is no such interpreter, or the environment cannot be made.
    """
    if python:
        if shutil.which(python) is None:
            raise PeerError(f"{python} is not a Python that can be run")
        return Path(python)
    folder = environment(script)
    executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = folder / "complete"
    if complete.exists():
        return executable
    try:
        venv.create(folder, clear=True, with_pip=True, symlinks=os.name != "nt")
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(f"the virtual environment {folder} cannot be made ({error})") from error
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *dependencies(script)]
    _run(executable, install, f"pip cannot install what {script.name} needs into {folder}")
    complete.touch()
    return executable


def run_script(python: Path, script: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs a script to its end and returns the JSON object that it printed.

    Args:
      python: an interpreter that has what the script needs.
      script: the script.
      arguments: of its command line.
      environ: its environment variables; those of this process if not given.

    Raises:
      PeerError: it failed, or printed something else.
    """
    output = _run(python, [str(script), *arguments], f"{script.name} failed", environ)
    try:
        return json.loads(output)
    except ValueError as error:
        raise PeerError(f"{script.name} did not print a JSON object ({error}): {output[:80]!r}") from error


def _run(python: Path, arguments: list[str], failure: str, environ: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False, env=environ)
    except OSError as error:
        raise PeerError(f"{failure}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise PeerError(f"{failure}: {lines[-1].strip() if lines else f'exit status {done.returncode}'}")
    return done.stdout
