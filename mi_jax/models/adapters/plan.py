"""The plan of an adapter: which tensor of a foreign model is which site, found by running the model once abstractly."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from mi_jax.core.sites import LAYER, Site, SiteError, SiteTable
from mi_jax.models.adapters.freight import Stack
from mi_jax.models.adapters.visits import Shape, Where

# one pattern of module paths, or the pattern and the axes of the tensor in one layer
Name = str | tuple[str, Sequence[str]]

_STREAM = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_WEIGHTS = ("batch", "head", "query", "key")
# axes of our own site names in one layer, taken where the rank fits and nothing else is said
_CANONICAL = {
    "attn.q": _HEADS,
    "attn.k": ("batch", "pos", "kv_head", "d_head"),
    "attn.v": ("batch", "pos", "kv_head", "d_head"),
    "attn.z": _HEADS,
    "attn.scores": _WEIGHTS,
    "attn.pattern": _WEIGHTS,
    "attn.head_out": ("batch", "pos", "head", "d_model"),
    "mlp.pre": ("batch", "pos", "d_mlp"),
    "mlp.post": ("batch", "pos", "d_mlp"),
    "logits": ("batch", "pos", "d_vocab"),
} | dict.fromkeys(
    ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp.in", "final_norm"), _STREAM
)
# names that mean something: a module that happens to be called so is not taken for it
_RESERVED = {*_CANONICAL, "attn.q_in", "attn.k_in", "attn.v_in"}
# axes whose size is that of the input, or of one site only
_UNSIZED = ("batch", "pos", "query", "key", "unit")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor that a foreign model computes.

    Attributes:
      shape: in one layer, with the axes that the model maps over.
      stack: how the layers are stacked, where they are scanned over.
    """

    where: Where
    shape: Shape
    dtype: str
    stack: Stack | None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor belongs: its site, and its layer where the layers are separate modules."""

    tensor: Tensor
    site: str
    layer: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sites of a foreign model and the tensors that they are made of.

    Attributes:
      ranks: of the example's inputs; the axes of the sites hold for these.
    """

    table: SiteTable
    places: tuple[Place, ...]
    ranks: tuple[int, ...] = ()


def names_of(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Tensors by what they are called, `path#call:port`, the number of the call left out where there is one call."""
    tensors = list(tensors)
    several = {t.where.path for t in tensors if t.where.call}
    out: dict[str, Tensor] = {}
    # a module seen from outside and from inside of `checkpoint` or `jit`: the same tensor, taken from outside
    for tensor in sorted(tensors, key=lambda t: t.where.nested):
        path, call, port, _ = tensor.where
        number = f"#{call}" if path in several else ""
        if path:
            name = f"{path}{number}:{port}" if port else f"{path}{number}"
        else:
            name = f"{port.replace('in', 'input')}{number}" if port.startswith("in") else f"output{number}"
            name += f":{port}" if port and not port.startswith("in") else ""
        out.setdefault(name, tensor)
    order = {tensor.where: i for i, tensor in enumerate(tensors)}
    return dict(sorted(out.items(), key=lambda item: order[item[1].where]))


Group = dict[int | None, Tensor]


def make_plan(model: str, tensors: Iterable[Tensor], leading: Shape, names: Mapping[str, Name]) -> Plan:
    """Sites from tensors: the user's names first, then equal tensors of numbered modules, then each by itself.

    Args:
      leading: the sizes of batch and positions in the example.
      names: site names, each with the name of a tensor in which `{layer}` stands for the layer's number.

    Raises:
      SiteError: a name that fits no tensor, layers that are not equal, or axes that do not fit.
    """
    left = names_of(tensors)
    groups: dict[str, Group] = {}
    axes: dict[str, tuple[str, ...]] = {}
    for site, spec in names.items():
        pattern, given = (spec, None) if isinstance(spec, str) else spec
        groups[site] = _named(model, site, pattern, left)
        axes[site] = _axes(site, groups[site], leading, given)
    siblings = _siblings(left)
    n_layers = _layer_count(groups.values(), siblings, left.values())
    for site, group in groups.items():
        if _depth(group) not in (0, n_layers):
            raise SiteError(f"site {site!r} of {model} has {_depth(group)} layers, other sites have {n_layers}")
    for site, members in siblings.items():
        if len(members) == n_layers and site not in left:
            groups[_free(site, groups)] = {layer: left.pop(name) for layer, name in members.items()}
    for name, tensor in left.items():
        # one model has one number of layers: what is scanned another number of times is no site of it
        if tensor.stack is None or tensor.stack.n == n_layers:
            groups[_free(name, groups)] = {None: tensor}
    sites = []
    sizes = {LAYER: n_layers} if n_layers else {}
    for site, group in groups.items():
        slice_axes = axes.get(site) or _axes(site, group, leading)
        sites.append(Site(site, (LAYER, *slice_axes) if _depth(group) else slice_axes))
        for axis, n in zip(slice_axes, _one(group).shape, strict=True):
            if axis not in _UNSIZED and not axis.startswith("axis") and sizes.setdefault(axis, n) != n:
                raise SiteError(f"axis {axis!r} of {model} has size {sizes[axis]}, and {n} in site {site!r}")
    places = tuple(Place(t, site, layer) for site, group in groups.items() for layer, t in group.items())
    return Plan(SiteTable(model, tuple(sites), tuple(sizes.items())), places)


def _free(name: str, groups: Mapping[str, Group]) -> str:
    """The name of an automatic site, told from those that the user gave and from those that mean something."""
    return f"{name}:out" if name in _RESERVED or name in groups else name


def _one(group: Group) -> Tensor:
    return next(iter(group.values()))


def _depth(group: Group) -> int:
    """Number of layers of a site; 0 if it exists once."""
    if None not in group:
        return len(group)
    stack = group[None].stack
    return stack.n if stack else 0


def _equal(tensors: Sequence[Tensor]) -> bool:
    return all(t.stack is None for t in tensors) and len({(t.shape, t.dtype) for t in tensors}) == 1


def _named(model: str, site: str, pattern: str, left: dict[str, Tensor]) -> Group:
    """The tensors behind a name of the user's, taken out of `left`."""
    layered = "{layer}" in pattern
    expression = re.compile(r"(\d+)".join(re.escape(text) for text in pattern.split("{layer}", 1)))
    found = {int(m[1]) if layered else None: name for name in left if (m := expression.fullmatch(name))}
    if not found:
        raise SiteError(f"no tensor of {model} is called {pattern!r} (for site {site!r}); it has {', '.join(left)}")
    group: Group = {layer: left.pop(found[layer]) for layer in sorted(found, key=lambda k: k or 0)}
    if layered and (sorted(k for k in group if k is not None) != list(range(len(group)))):
        raise SiteError(f"{pattern!r} of {model} (for site {site!r}) exists for {list(group)}: layers count from 0")
    if layered and not _equal(list(group.values())):
        shapes = ", ".join(str(t.shape) for t in group.values())
        raise SiteError(f"{pattern!r} of {model} (for site {site!r}) is not one tensor per layer: shapes {shapes}")
    return group


def _siblings(left: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Tensors of numbered modules, `layer_0/inp`, `layer_1/inp` …, by the name without the number, `layer/inp`."""
    families: dict[tuple[str, str], dict[int, str]] = {}
    for name in left:
        module = name.partition(":")[0]
        for number in re.finditer(r"\d+", module):
            family = (name[: number.start()], name[number.end() :])
            families.setdefault(family, {})[int(number[0])] = name
    out: dict[str, dict[int, str]] = {}
    taken: set[str] = set()
    # the outermost number is the layer: of two families with a tensor in common the one with the shorter beginning
    for (before, after), members in sorted(families.items(), key=lambda item: len(item[0][0])):
        complete = len(members) > 1 and sorted(members) == list(range(len(members)))
        name = before.rstrip("_#/.") + after
        free = name not in out and not taken & set(members.values())
        if complete and free and _equal([left[m] for m in members.values()]):
            out[name] = members
            taken |= set(members.values())
    order = {name: i for i, name in enumerate(left)}
    return dict(sorted(out.items(), key=lambda item: order[item[1][0]]))


def _layer_count(named: Iterable[Group], siblings: Mapping[str, Mapping], left: Iterable[Tensor]) -> int:
    """The number of layers: of the user's sites, else of most scanned tensors, else of most numbered modules."""
    for depths in (
        [_depth(group) for group in named],
        [tensor.stack.n for tensor in left if tensor.stack],
        [len(members) for members in siblings.values()],
    ):
        depths = [n for n in depths if n]
        if depths:
            return max(sorted(set(depths)), key=depths.count)
    return 0


def _axes(site: str, group: Group, leading: Shape, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Axes in one layer: as given, else those of our own names, else batch, position and unit as the shape has them."""
    shape = _one(group).shape
    if given is not None:
        if len(given) != len(shape):
            raise SiteError(f"site {site!r} was given axes {' '.join(given)}, but has shape {shape} in one layer")
        return tuple(given)
    canonical = _CANONICAL.get(site, ())
    if canonical and len(canonical) == len(shape):
        return canonical
    out = [f"axis{i}" for i in range(len(shape))]
    if leading and shape[:1] == leading[:1]:
        out[0] = "batch"
        if len(leading) == 2 and shape[1:2] == leading[1:]:
            out[1] = "pos"
    if len(out) > 1 and out[-1].startswith("axis"):
        out[-1] = "unit"
    return tuple(out)
