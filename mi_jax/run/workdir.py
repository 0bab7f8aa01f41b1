"""The folder that an experiment writes: it describes itself, and the same folder resumes the run.

    config.json        the experiment's name and its config
    results.json       one flat object: dotted names to numbers, strings or booleans
    costs.json         seconds of each stage and peak memory, over all runs that it took
    metrics.jsonl      one line per logged step
    tensorboard/       the same for TensorBoard, where that is asked for
    stages/NAME.json   what a finished stage returned; its presence means that the stage is done
    checkpoints/NAME.safetensors

In a run of several processes one of them writes, by convention the one with `jax.process_index() == 0`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from mi_jax.core.dtypes import SAFETENSORS_DTYPES
from mi_jax.run import files
from mi_jax.run.config import config_to_json, differing_fields
from mi_jax.run.events import EventFiles
from mi_jax.run.files import WorkdirError

Scalar = bool | int | float | str

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_RESULT_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_WRITTEN_HERE = ("results.json", "metrics.jsonl", "stages", "checkpoints")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's folder, local or remote (`gs://…`). Make one with `Workdir.open`."""

    path: epath.Path
    events: EventFiles | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def open(
        cls, path: epath.PathLike, config: Any, *, experiment: str | None = None, tensorboard: bool = False
    ) -> "Workdir":
        """Opens `path` for a run with `config`, creating the folder if it is new.

        Args:
          path: the folder; its parents are created as well.
          config: a (nested) frozen dataclass of numbers, strings, booleans, None, paths and sequences of these.
          experiment: the experiment's name; the config class's name if not given.
          tensorboard: whether `log` also writes event files for TensorBoard.

        Raises:
          WorkdirError: the folder holds another experiment, the same one with another config, or a run whose
            config.json is missing or damaged. Nothing is written then.
          InputError: TensorBoard was asked for, and tensorboardX is not installed.
        """
        root = epath.Path(path).expanduser()
        experiment = experiment or type(config).__name__
        events = EventFiles(root / "tensorboard") if tensorboard else None
        # Through JSON and back, so that a value compares as it will be read.
        asked = json.loads(json.dumps(config_to_json(config)))
        file = root / "config.json"
        if root.exists() and not root.is_dir():
            raise WorkdirError(f"{root} is a file; a workdir is a folder")
        if file.exists():
            _check_same_run(root, files.read_json(file), experiment, asked)
            _drop_unfinished_line(root / "metrics.jsonl")
        elif held := [name for name in _WRITTEN_HERE if (root / name).exists()]:
            raise WorkdirError(
                f"{root} has {', '.join(held)} but no config.json, so it cannot be told which run it belongs to. "
                "Use another workdir, or delete this one to start anew"
            )
        else:
            files.write_json(file, {"experiment": experiment, "config": asked})
        return cls(root, events)

    @property
    def config(self) -> dict[str, Any]:
        """The config, as config.json holds it."""
        return files.read_json(self.path / "config.json")["config"]

    @property
    def results(self) -> dict[str, Scalar]:
        """All results so far."""
        file = self.path / "results.json"
        return files.read_json(file) if file.exists() else {}

    def write_bytes(self, name: str, data: bytes) -> epath.Path:
        """Writes a file atomically; `name` is relative to the workdir, such as `figures/loss.svg`. Returns its path."""
        path = self._inside(name)
        files.write_bytes(path, data)
        return path

    def write_json(self, name: str, value: Any) -> epath.Path:
        """Writes a JSON file atomically; `name` is relative to the workdir. Returns its path."""
        path = self._inside(name)
        files.write_json(path, value)
        return path

    def add_results(self, results: Mapping[str, Any]) -> None:
        """Merges `results` into results.json in one atomic write; a name that exists is replaced.

        Args:
          results: dotted names such as `circuit.faithfulness` to numbers, strings or booleans. Zero-dimensional
            arrays are taken as the number they hold.

        Raises:
          ValueError: a name is not dotted words, a value is not a scalar, or a number is not finite; nothing is
            written.
        """
        merged = self.results | {_result_name(name): _result_value(name, value) for name, value in results.items()}
        files.write_json(self.path / "results.json", merged)

    def log(self, step: int, **scalars: Any) -> None:
        """Appends one line to metrics.jsonl. A non-finite number is written as null: a run that diverges still logs.

        The file only grows: a run that resumes logs the steps that it repeats once more.
        """
        line: dict[str, Any] = {"step": int(step)}
        for name, value in scalars.items():
            number = _scalar(name, value)
            line[name] = None if isinstance(number, float) and not math.isfinite(number) else number
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.events is not None:
            self.events.add(step, {name: value for name, value in line.items() if name != "step"})

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
          WorkdirError: a line is damaged. (The unfinished last line of a run that was killed is dropped by `open`.)
        """
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        lines = []
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise WorkdirError(f"{file} line {number} is not valid JSON ({error}): {line[:80]!r}") from error
        return lines

    def stage_done(self, name: str) -> bool:
        """Whether `save_stage` has been called for this stage."""
        return self._stage(name).exists()

    def save_stage(self, name: str, data: Mapping[str, Any]) -> None:
        """Marks a stage as done and keeps `data` for the stages after it. Save its arrays before, not after."""
        files.write_json(self._stage(name), dict(data))

    def load_stage(self, name: str) -> dict[str, Any]:
        """What `save_stage` was given.

        Raises:
          WorkdirError: the stage is not done, or its file is damaged.
        """
        data = files.read_json(self._stage(name))
        if not isinstance(data, dict):
            raise WorkdirError(f"{self._stage(name)} should hold an object, but holds a {type(data).__name__}")
        return data

    def has_arrays(self, name: str) -> bool:
        """Whether `save_arrays` has been called with this name."""
        return self._checkpoint(name).exists()

    def save_arrays(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Writes a flat mapping of names to arrays to checkpoints/NAME.safetensors, atomically."""
        tensors = {}
        for key, array in arrays.items():
            if not hasattr(array, "shape") or not hasattr(array, "dtype"):
                raise ValueError(f"checkpoint {name!r}: {key!r} is a {type(array).__name__}, not an array")
            tensors[key] = np.asarray(array, order="C")
            if tensors[key].dtype not in SAFETENSORS_DTYPES.values():
                raise ValueError(f"checkpoint {name!r}: {key!r} has dtype {tensors[key].dtype}, which has no file form")
        files.write_bytes(self._checkpoint(name), safetensors.numpy.save(tensors))

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays that `save_arrays` wrote.

        Raises:
          WorkdirError: there is no such checkpoint, or its file is damaged.
        """
        file = self._checkpoint(name)
        if not file.exists():
            folder = file.parent
            held = sorted(p.stem for p in folder.iterdir() if p.suffix == ".safetensors") if folder.exists() else []
            raise WorkdirError(f"{file} does not exist; the checkpoints are: {', '.join(held) or 'none'}")
        try:
            stored = safetensors.deserialize(file.read_bytes())
            return {key: _array(entry) for key, entry in stored}
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise WorkdirError(
                f"{file} is not a whole safetensors file ({error}). Files are written whole here, so it was damaged: "
                "delete it and the stages that came after it, or use another workdir"
            ) from error

    def _stage(self, name: str) -> epath.Path:
        return self.path / "stages" / f"{_file_name(name)}.json"

    def _checkpoint(self, name: str) -> epath.Path:
        return self.path / "checkpoints" / f"{_file_name(name)}.safetensors"

    def _inside(self, name: str) -> epath.Path:
        parts = name.split("/")
        if not all(_FILE_NAME.fullmatch(part) for part in parts):
            raise ValueError(f"{name!r} is not a file name relative to the workdir, such as 'figures/loss.svg'")
        return self.path.joinpath(*parts)


def _array(entry: Mapping[str, Any]) -> np.ndarray:
    # not through `safetensors.numpy.load`, which lacks bfloat16 and the eight-bit floats
    return np.frombuffer(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _check_same_run(root: epath.Path, held: Any, experiment: str, asked: dict[str, Any]) -> None:
    if not isinstance(held, dict) or not isinstance(held.get("config"), dict) or "experiment" not in held:
        raise WorkdirError(f"{root / 'config.json'} is not a config that this program wrote; use another workdir")
    if held["experiment"] != experiment:
        raise WorkdirError(
            f"{root} holds a run of experiment {held['experiment']!r}, and {experiment!r} was asked for. "
            "Use another workdir, or delete this one to start anew"
        )
    if lines := differing_fields(held["config"], asked):
        raise WorkdirError(
            f"{root} holds a run of {experiment!r} with another config:\n  "
            + "\n  ".join(lines)
            + "\nGive the same values to resume it, or another workdir, or delete this one to start anew"
        )


def _drop_unfinished_line(file: epath.Path) -> None:
    if file.exists() and not (data := file.read_bytes()).endswith(b"\n"):
        files.write_bytes(file, data[: data.rfind(b"\n") + 1])


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a file: use letters, digits, '_', '-' and '.', and no '/'")
    return name


def _result_name(name: str) -> str:
    if not isinstance(name, str) or not _RESULT_NAME.fullmatch(name):
        raise ValueError(f"result name {name!r} is not words joined by dots, such as 'circuit.faithfulness_null'")
    return name


def _result_value(name: str, value: Any) -> Scalar:
    scalar = _scalar(name, value)
    if isinstance(scalar, float) and not math.isfinite(scalar):
        raise ValueError(
            f"result {name!r} is {scalar}; results.json holds finite numbers. Leave the result out, or report why it "
            "could not be computed as a string"
        )
    return scalar


def _scalar(name: str, value: Any) -> Scalar:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool | int | float | str):
        return value
    shape = f" of shape {value.shape}" if hasattr(value, "shape") else ""
    raise ValueError(f"{name!r} is a {type(value).__name__}{shape}; a number, string or boolean is needed")
