"""Checkpoints of trainings with Orbax: everything that a step changes, written whole or not at all.

Batch t is a function of t, so the step that is in the state is also the position in the data. `training.json` in the
folder says what it holds checkpoints of.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from mi_jax.core.errors import InputError
from mi_jax.run import files
from mi_jax.run.config import differing_fields


class Checkpoints:
    """The newest checkpoints of one run, by step.

    A state may come back on another number of devices: it is placed as the tree that is passed to `restore`.

    Args:
      folder: created when the first checkpoint is written.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self.folder = os.path.abspath(os.fspath(folder))
        handlers = {"states": ocp.StandardCheckpointHandler(), "curves": ocp.StandardCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Makes the folder that of one training, or checks that it is.

        A folder without a checkpoint is free.

        Args:
          identity: all that the training's numbers depend on, as JSON.

        Raises:
          InputError: the folder holds checkpoints of another training; says what differs.
        """
        file, asked = epath.Path(self.folder) / "training.json", json.loads(json.dumps(identity))
        if self.latest() is None:
            if jax.process_index() == 0:
                files.write_json(file, asked)
            return
        advice = "use another folder, or delete this one to start anew"
        if not file.exists():
            raise InputError(
                f"{self.folder} has checkpoints but no {file.name}, so it cannot be told what they are of; {advice}"
            )
        lines = differing_fields(files.read_json(file), asked, "", place="in the folder")
        if lines:
            named = "\n  ".join(line.removeprefix(".") for line in lines)
            if any(".train.steps: " in line for line in lines):
                advice += ". The schedule depends on its number of steps: another number is another training"
            raise InputError(
                f"{self.folder} holds checkpoints of another training:\n  {named}\nGive the same values to go on with "
                f"it; {advice}"
            )

    def save(self, step: int, states: PyTree, curves: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Writes arrays, and what every step so far measured, by training and metric."""
        items = {"states": ocp.args.StandardSave(_flat(states)), "curves": ocp.args.StandardSave(_as_arrays(curves))}
        self._manager.save(step, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, dict[str, np.ndarray]]]:
        """The newest states, placed as `like` is (arrays, or their shapes with shardings), and the curves.

        Raises:
          InputError: the checkpoint is of another run: other arrays, or other shapes.
        """
        step = self.latest()
        assert step is not None
        wanted = _flat(like)
        held = self._manager.item_metadata(step)["states"].tree
        form = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in held.items()}
        asked = {name: (x.shape, np.dtype(x.dtype)) for name, x in wanted.items()}
        if wrong := sorted(name for name in form | asked if form.get(name) != asked.get(name)):
            name = wrong[0]
            raise InputError(
                f"{self.folder}: the checkpoint of step {step} is of another training: {name} is "
                f"{_said(form.get(name))} there and {_said(asked.get(name))} here; use another folder, or the same "
                "configuration"
            )
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
        items = {"states": ocp.args.StandardRestore(abstract), "curves": ocp.args.StandardRestore()}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return _unflat(found["states"], like), {name: dict(curve) for name, curve in found["curves"].items()}

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _flat(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their path."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unflat(arrays: Mapping[str, Any], like: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[jax.tree_util.keystr(path)], like)


def _as_arrays(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    return {name: {key: np.asarray(value) for key, value in curve.items()} for name, curve in curves.items()}


def _said(form: tuple | None) -> str:
    return "missing" if form is None else f"{form[1]}{list(form[0])}"
