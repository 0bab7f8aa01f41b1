"""The pickle inside a torch file, read by a parser that knows tensors and plain containers and runs nothing.

A pickle is a program for a stack machine. Of its instructions only those that build numbers, texts, lists, tuples and
dicts are carried out here, and of the functions it may name only those that describe a tensor. Python's own unpickler,
which calls whatever a file names, is never used.

Source: https://docs.python.org/3/library/pickletools.html; https://pytorch.org/docs/stable/notes/serialization.html.
"""

import dataclasses
import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mi_jax.models.checkpoints.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "FloatStorage": np.float32,
        "DoubleStorage": np.float64,
        "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": np.int64,
        "IntStorage": np.int32,
        "ShortStorage": np.int16,
        "CharStorage": np.int8,
        "ByteStorage": np.uint8,
        "BoolStorage": np.bool_,
    }.items()
}


class Storage(NamedTuple):
    """Numbers that one or several tensors look into: entry `key` of the file."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor as the file describes it; its numbers are not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Function(NamedTuple):
    """A function that a file names; only those of `_FUNCTIONS` are carried out, and by us."""

    module: str
    name: str


class _Mark:
    """Where a container's items begin on the stack."""


class _Refused(Exception):
    """The fault, without the file's name."""


def _tensor(storage, offset, shape, strides, *rest) -> TorchTensor:
    counts = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or not all(_is_count(n) for n in counts):
        raise _Refused("a tensor is not described by a storage, an offset, a shape and strides")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # a stride of 0 would make a tensor larger than the file
    if 0 not in shape and (last >= storage.size or math.prod(shape) > storage.size):
        raise _Refused(f"a tensor of shape {tuple(shape)} reaches beyond its {storage.size} numbers")
    return TorchTensor(storage, offset, tuple(shape), tuple(strides))


_FUNCTIONS: dict[_Function, Callable[..., Any]] = {
    _Function("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Function("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    _Function("torch", "Size"): lambda sizes=(): tuple(sizes),
    _Function("collections", "OrderedDict"): lambda pairs=(): dict(pairs),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS_AND_TEXTS = set(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING".split()
)
_NOTHING = {"PROTO", "FRAME"}


def parse(data: bytes, path: str) -> Any:
    """What the pickle describes: containers, numbers and texts, with a `TorchTensor` for every tensor.

    Raises:
      CheckpointError: it is damaged, or holds anything else; the message names the instruction or the function.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    where = ""
    try:
        for opcode, argument, position in pickletools.genops(data):
            where = f"instruction {opcode.name} at byte {position}"
            if opcode.name == "STOP":
                if len(stack) != 1:
                    raise _Refused("it ends with other than one value")
                return stack[0]
            _step(opcode.name, argument, stack, memo)
    except _Refused as error:
        raise CheckpointError(
            f"{path}: {error} ({where}). Only tensors and plain containers are read from torch files, so that a file "
            "can run nothing; save the state_dict alone, or as safetensors"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its pickle is damaged ({where or 'at the start'}: {error})") from error
    raise CheckpointError(f"{path}: its pickle is damaged: it has no end")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One instruction."""
    if name in _NOTHING:
        return
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _NUMBERS_AND_TEXTS:
        stack.append(argument)
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name == "MARK":
        stack.append(_Mark())
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        n = int(name[-1])
        stack[-n:] = [tuple(stack[-n:])]
    elif name == "TUPLE":
        stack.append(tuple(_items(stack)))
    elif name == "APPEND":
        item = stack.pop()
        _expect(stack[-1], list).append(item)
    elif name == "APPENDS":
        items = _items(stack)
        _expect(stack[-1], list).extend(items)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _expect(stack[-1], dict)[key] = value
    elif name == "SETITEMS":
        items = _items(stack)
        _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(_named(*argument.split(" ", 1)))
    elif name == "STACK_GLOBAL":
        function, module = stack.pop(), stack.pop()
        stack.append(_named(module, function))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        if function not in _FUNCTIONS:
            raise _Refused(f"it calls {function!r}")
        stack.append(_FUNCTIONS[function](*arguments))
    elif name == "BUILD":
        # torch hangs version numbers on the dict of a module's tensors
        stack.pop()
        _expect(stack[-1], dict)
    else:
        raise _Refused(f"the instruction {name} is not among those that are carried out")


def _items(stack: list[Any]) -> list[Any]:
    """What lies above the last mark; it and the mark are taken off."""
    begin = max(i for i, item in enumerate(stack) if isinstance(item, _Mark))
    items = stack[begin + 1 :]
    del stack[begin:]
    return items


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Refused(f"an item is added to a {type(value).__name__}")
    return value


def _named(module: str, name: str) -> Any:
    function = _Function(module, name)
    if function in _FUNCTIONS:
        return function
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    raise _Refused(f"it names {module}.{name}")


def _storage(described: Any) -> Storage:
    kind, dtype, key, _, size = described
    if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str) or not _is_count(size):
        raise _Refused(f"it refers to {described!r}")
    return Storage(dtype, key, size)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict with dotted names, containers other than dicts as they are."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
