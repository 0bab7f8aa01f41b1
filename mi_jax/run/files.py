"""Files that are either whole or absent: written to a temporary name beside the target, then renamed onto it."""

import contextlib
import json
import os
import uuid
from typing import Any

from etils import epath

from mi_jax.core.errors import InputError


class WorkdirError(InputError):
    """A workdir holds something else than what was asked for, or a file in it is damaged."""


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes `data` so that a reader, or a run after a crash, sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_remote(path):
        # An object store shows an object only once it is complete, and has no rename.
        path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            # Without this, some filesystems keep the rename but not the bytes when the machine itself goes down.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: epath.Path, value: Any) -> None:
    """Writes `value` as JSON, atomically.

    Raises:
      ValueError: `value` holds a non-finite number, or something that JSON has no form for.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name} cannot be written: {error}. JSON holds finite numbers, strings, booleans, null, lists and "
            "objects with string keys; arrays belong in `Workdir.save_arrays`"
        ) from error
    write_bytes(path, (text + "\n").encode())


def read_json(path: epath.Path) -> Any:
    """Reads a JSON file.

    Raises:
      WorkdirError: the file is absent, or is not JSON.
    """
    if not path.exists():
        raise WorkdirError(f"{path} does not exist")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise WorkdirError(
            f"{path} is not valid JSON ({error}). Files are written whole here, so it was damaged or edited: delete it "
            "and run again to make it anew, or use another workdir"
        ) from error


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)
