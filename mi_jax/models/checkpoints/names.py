"""Where each parameter lies in a checkpoint: one entry serves reading and writing.

Families store the same linear maps under other names, transposed, with heads flattened, or several in one tensor. An
entry says so once: the part of the stored tensor that is meant, an einops pattern, and which of its slices.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import numpy as np

from mi_jax.models.config import DecoderConfig

Tensor = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one parameter of the decoder lies in a checkpoint.

    Attributes:
      path: of the parameter, "blocks.attn.q".
      name: of the stored tensor, with `{layer}` and `{expert}` where there is one for each of them.
      pattern: einops pattern from the stored tensor, or its part, to the parameter without the axes that `name`
        counts; "(head d_head) d_model -> d_model head d_head".
      part: `(axis, start, stop)` of the stored tensor, taken before the pattern.
      pick: index into the first axis of the pattern's result.

    Example:
      The keys of GPT-NeoX, where each head has its query, key and value together:
      `Stored("blocks.attn.k", "gpt_neox.layers.{layer}.attention.query_key_value.weight",
      "(head three d_head) d_model -> three d_model head d_head", pick=1)`
    """

    path: str
    name: str
    pattern: str
    part: tuple[int, int, int] | None = None
    pick: int | None = None

    @property
    def counts(self) -> tuple[str, ...]:
        """The leading axes of the parameter that `name` counts: of ("layer", "expert")."""
        return tuple(axis for axis in ("layer", "expert") if f"{{{axis}}}" in self.name)

    def each(self, sizes: Mapping[str, int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Every place in the leading axes of the parameter with the name of its tensor."""
        for index in _indices([sizes[axis] for axis in self.counts]):
            yield index, self.at(index)

    def at(self, index: Sequence[int]) -> str:
        """The name of the tensor for one place in the leading axes."""
        name = self.name
        for axis, place in zip(self.counts, index, strict=True):
            name = name.replace(f"{{{axis}}}", str(place))
        return name


def _indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices of a shape, one by one: a damaged configuration may announce more layers than memory has room for."""
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (first, *rest)


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Sizes of the axes that patterns name; `half` and `two` are those of a head's rotary pairs."""
    sizes = {
        "layer": config.n_layers,
        "d_model": config.d_model,
        "head": config.n_heads,
        "kv_head": config.n_kv_heads,
        "d_head": config.d_head,
        "d_mlp": config.d_mlp,
        "expert": config.n_experts,
        "d_vocab": config.d_vocab,
        "half": config.d_head // 2,
        "two": 2,
        "three": 3,
    }
    if config.patches is not None:
        sizes |= {"channel": config.patches.n_channels}
        sizes |= {"height": config.patches.patch_size, "width": config.patches.patch_size}
    return sizes


def stored_to_ours(x: Tensor, stored: Stored, sizes: Mapping[str, int]) -> Tensor:
    """One parameter, without the axes that the name counts, from the stored tensor: a view where numpy can give one."""
    if stored.part is not None:
        axis, start, stop = stored.part
        x = x[(slice(None),) * axis + (slice(start, stop),)]
    return part_to_ours(x, stored, sizes)


def part_to_ours(x: Tensor, stored: Stored, sizes: Mapping[str, int]) -> Tensor:
    """The same from the part alone, where no more than that was read."""
    ours = einops.rearrange(x, stored.pattern, **_named(stored.pattern, sizes))
    return ours if stored.pick is None else ours[stored.pick]


def ours_to_stored(parts: Sequence[tuple[Stored, Tensor]], sizes: Mapping[str, int]) -> Tensor:
    """The stored tensor from all the parameters that lie in it.

    Args:
      parts: every entry that has this tensor's name, with its parameter.

    Raises:
      ValueError: the entries overlap, or leave a part of the tensor out.
    """
    name, whole = parts[0][0].name, [pair for pair in parts if pair[0].part is None]
    if whole:
        if len(whole) < len(parts):
            raise ValueError(f"some entries of {name!r} are the whole tensor, others parts of it")
        return _put_back(whole, sizes)
    by_part: dict[tuple[int, int, int], list[tuple[Stored, Tensor]]] = {}
    for stored, x in parts:
        by_part.setdefault(stored.part or (0, 0, 0), []).append((stored, x))
    axis, end, tensors = min(by_part)[0], 0, []
    for part in sorted(by_part):
        tensor = _put_back(by_part[part], sizes)
        if part[:2] != (axis, end) or tensor.shape[axis] != part[2] - part[1]:
            raise ValueError(f"part {part} of {name!r} begins at {end} and is {tensor.shape[axis]} long")
        end = part[2]
        tensors.append(tensor)
    axes = [f"axis_{i}" if i != axis else "*" for i in range(tensors[0].ndim)]
    return einops.pack(tensors, " ".join(axes))[0]


def _put_back(parts: Sequence[tuple[Stored, Tensor]], sizes: Mapping[str, int]) -> Any:
    """What the pattern was applied to."""
    stored, x = parts[0]
    if stored.pick is not None:
        by_pick = {each.pick: x for each, x in parts}
        if len(by_pick) < len(parts) or set(by_pick) != set(range(len(parts))):
            raise ValueError(f"the slices of {stored.name!r} are {[each.pick for each, _ in parts]}, not 0, 1, …")
        x = [by_pick[pick] for pick in range(len(parts))]
    elif len(parts) > 1:
        raise ValueError(f"{len(parts)} parameters lie in the same place of {stored.name!r}")
    left, right = stored.pattern.split("->")
    return einops.rearrange(x, f"{right} -> {left}", **_named(stored.pattern, sizes))


def _named(pattern: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of the axes that are folded into one: einops infers all others."""
    folded = {axis for group in re.findall(r"\(([^)]*)\)", pattern) for axis in group.split()}
    return {axis: size for axis, size in sizes.items() if axis in folded}
