"""Torch files as torch writes them, made by Python's own pickler with stand-ins for torch's names."""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "int32": "IntStorage", "int64": "LongStorage"}


def _stand_in(module, name):
    found = type(name, (), {})
    found.__module__, found.__qualname__ = module, name
    return found


def _modules():
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in _STORAGES.values():
        setattr(torch, name, _stand_in("torch", name))
    torch.Size = _stand_in("torch", "Size")
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(utils, name, _stand_in("torch._utils", name))
    torch._utils = utils
    return {"torch": torch, "torch._utils": utils}


class _Stored:
    def __init__(self, dtype, key, size):
        self.description = ("storage", getattr(sys.modules["torch"], _STORAGES[str(dtype)]), key, "cpu", size)


class Tensor:
    """A tensor as a pickle describes it, whatever its sizes say."""

    def __init__(self, shape, strides, offset=0, size=4, dtype="float32", key="0"):
        self.layout, self.storage = (offset, shape, strides), (dtype, key, size)

    def __reduce__(self):
        arguments = (_Stored(*self.storage), *self.layout, False, collections.OrderedDict())
        return sys.modules["torch._utils"]._rebuild_tensor_v2, arguments


def _tensor(array, key, transposed):
    shape, strides = array.shape, tuple(s // array.itemsize for s in array.strides)
    if transposed:
        shape, strides = shape[::-1], strides[::-1]
    return Tensor(shape, strides, 0, array.size, array.dtype, key)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.description if isinstance(obj, _Stored) else None


def pickled(state, protocol=2):
    """The pickle of a dict with `Tensor`s in it."""
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update(_modules())
    try:
        out = io.BytesIO()
        _Pickler(out, protocol).dump(state)
        return out.getvalue()
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def save(path, state, *, transposed=(), protocol=2):
    """A file of `state`: arrays become tensors; those in `transposed` are views whose memory lies the other way."""
    arrays = {}

    def described(state):
        ordered = collections.OrderedDict()
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                key = str(len(arrays))
                arrays[key] = np.asarray(value.T if name in transposed else value, order="C")
                ordered[name] = _tensor(arrays[key], key, name in transposed)
            else:
                ordered[name] = described(value) if isinstance(value, dict) else value
        return ordered

    ordered = described(state)
    ordered._metadata = collections.OrderedDict({"": {"version": 1}})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled(ordered, protocol))
        archive.writestr("model/byteorder", "little")
        for key, array in arrays.items():
            archive.writestr(f"model/data/{key}", array.tobytes())
        archive.writestr("model/version", "3\n")
