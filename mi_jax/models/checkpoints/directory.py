"""The weights of a checkpoint directory: one safetensors file, or several and the index that says which holds what."""

import dataclasses
import json
import os
from collections.abc import Mapping

import numpy as np

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.safetensors import SafetensorsFile, open_safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")
# by the class that the configuration names: the bare `AutoModel` would leave out the unembedding
CONVERT = (
    "python -c \"import transformers as t; p = '{path}'; name = t.AutoConfig.from_pretrained(p).architectures[0]; "
    "getattr(t, name).from_pretrained(p).save_pretrained(p + '-safetensors', safe_serialization=True)\""
)


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of an index as one `Source`."""

    path: str
    files: Mapping[str, SafetensorsFile]

    def names(self) -> list[str]:
        return list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._file(name).dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._file(name).read(name, start, stop)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self.files:
            raise CheckpointError(f"{self.path}: no tensor {name!r} in the index of {len(self.files)}")
        return self.files[name]


def open_directory(path: str | os.PathLike) -> SafetensorsFile | Shards:
    """Opens `model.safetensors`, or else the shards that `model.safetensors.index.json` names; checks all headers.

    Raises:
      CheckpointError: neither is there; a directory of pickles, which is refused because unpickling runs the code that
        a file holds; an index that names files elsewhere, files that are missing, or tensors that its files lack.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such directory")
    if os.path.isfile(os.path.join(path, WEIGHTS)):
        return open_safetensors(os.path.join(path, WEIGHTS))
    if os.path.isfile(os.path.join(path, INDEX)):
        return open_index(os.path.join(path, INDEX))
    others = sorted(os.listdir(path))
    if pickles := [name for name in others if name.endswith(_PICKLES)]:
        raise CheckpointError(
            f"{path}: its weights are {pickles[0]}, not safetensors, and reading such a file can run code that it "
            f"holds. Convert it where you trust it: {CONVERT.format(path=path.rstrip(os.sep))}"
        )
    raise CheckpointError(f"{path}: neither {WEIGHTS} nor {INDEX}; it holds {', '.join(others[:8]) or 'nothing'}")


def open_index(path: str | os.PathLike) -> Shards:
    """Opens an index and all its shards.

    Raises:
      CheckpointError: see `open_directory`.
    """
    path = os.fspath(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: damaged index: weight_map is not an object from tensors to files")
    folder, files = os.path.dirname(path), {}
    for file in weight_map.values():
        # a plain name that ends so is neither "." nor ".." nor a path
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\\0"):
            raise CheckpointError(f"{path}: the index names {file!r}; shards are .safetensors files beside it")
        if file not in files:
            if not os.path.isfile(os.path.join(folder, file)):
                raise CheckpointError(f"{path}: the index names {file!r}, which is not there; fetch it again")
            files[file] = open_safetensors(os.path.join(folder, file))
    for name, file in weight_map.items():
        if name not in files[file].entries:
            raise CheckpointError(f"{path}: the index says {file!r} holds {name!r}, which it does not")
    return Shards(folder, {name: files[file] for name, file in weight_map.items()})


def read_json(path: str) -> dict:
    """One JSON object.

    Raises:
      CheckpointError: missing, not JSON, or something else than an object.
    """
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read().decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint directory has a {os.path.basename(path)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value
