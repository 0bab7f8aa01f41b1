"""`path_patch`: what one node does to a model through chosen paths only.

Three kinds of run (Goldowsky-Dill et al. 2023; Wang et al. 2022, appendix B):

1. both prompts, plain; one is patched (the base), the other gives the values (the source);
2. the base with the sender at its source value, and every attention head and every MLP held at its base value, save
   those that `through` names; the receivers' values are kept;
3. the base with the receivers at these values, everything else free.

With nothing in `through` only the direct path counts: along the residual stream, through the norms, which are not
linearised.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mi_jax.core.edits import Edit, Patch
from mi_jax.core.effects import Effects, base_and_source, check_direction, mean_metric
from mi_jax.core.index import Each, Index, check_places, index_axis
from mi_jax.core.nodes import INDEX_NAMES, Node, as_node, edited
from mi_jax.core.reach import check_path
from mi_jax.core.sites import SiteError, SiteTable
from mi_jax.core.transforms import SiteModel

# What a held attention output makes constant too.
_MADE_OF = {"attn.z": ("attn.head_out", "attn_out"), "attn.head_out": ("attn_out",)}


class _Hold(Edit):
    """Replaces the value where it is not free; the operand is `(value, free)`, both of the whole site."""

    def prepare(self, operand, x, place):
        return operand

    def new(self, x, operand):
        value, free = operand
        return jnp.where(free, x, value)


class PathPatch(eqx.Module):
    """See `path_patch`."""

    model: SiteModel
    sender: Node
    receivers: tuple[Node, ...]
    metric: Callable | None
    through: tuple[Node, ...]
    direction: str = eqx.field(static=True)
    frozen: tuple[str, ...] = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)

    def prepared(self, *inputs) -> "PathPatch":
        """Checks the nodes' positions, which `mi.jit` calls for before it hides their values."""
        for place in (self.sender, *self.receivers, *self.through):
            if eqx.is_array(place.index.pos):
                check_places(place.site, "pos", place.index.pos, self.model.site_table.n_pos(inputs[0]))
        return self

    def __call__(
        self, clean: Shaped[Array, "batch *input"], corrupt: Shaped[Array, "..."], **options
    ) -> Effects | Array:
        base, source = base_and_source(clean, corrupt, self.direction)
        base_output, at = self.model(base, capture=self.frozen, **options)
        source_output, to = self.model(source, capture=(self.sender.site,), **options)
        held = self._held(at)
        received = tuple(dict.fromkeys(r.site for r in self.receivers))

        def patched(place):
            index = self.sender.index.replace(**place) if place else self.sender.index
            sender = Node(self.sender.site, index).patch(to)
            taps = {**held, sender.site: (*held.get(sender.site, ()), sender)}
            _, values = self.model(base, taps=taps, capture=received, **options)
            edits: dict[str, tuple[Edit, ...]] = dict.fromkeys(received, ())
            for receiver in self.receivers:
                edits[receiver.site] = (*edits[receiver.site], receiver.patch(values))
            output = self.model(base, taps=edits, **options)
            return output if self.metric is None else mean_metric(self.metric(output))

        marked, sizes = self._marked(clean)
        if marked:
            grid = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.int32) for n in sizes), indexing="ij")
            cells = {name: places.reshape(-1) for name, places in zip(marked, grid, strict=True)}
            results = jax.lax.map(patched, cells, batch_size=min(self.batch_size, cells[marked[0]].size))
            results = results.reshape(*sizes, *results.shape[1:])
        else:
            results = patched({})
        if self.metric is None:
            return results
        baseline, target = (mean_metric(self.metric(output)) for output in (base_output, source_output))
        axes = ((self.sender.site, marked),)
        return Effects({self.sender.site: results - baseline}, baseline, target, self.direction, "path patching", axes)

    def _held(self, at: dict[str, Float[Array, "..."]]) -> dict[str, tuple[Edit, ...]]:
        """Edits that hold components at their base value, save at the places of `through`."""
        held: dict[str, tuple[Edit, ...]] = {}
        for name in self.frozen:
            free = [place for place in self.through if place.site == name]
            if not free:
                held[name] = (Patch(name, Index(), at[name]),)
            elif not any(not place.index.items() for place in free):
                passes = jnp.zeros_like(at[name])
                for place in free:
                    passes = edited(place.patch(jnp.ones((), passes.dtype)), passes, self.model.site_table)
                held[name] = (_Hold(name, Index(), (at[name], passes > 0)),)
        return held

    def _marked(self, tokens: Array) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The sender's indices that are `mi.each`, and how many places each has."""
        table = self.model.site_table
        site, _ = table.resolve(self.sender.site)
        names = tuple(name for name in INDEX_NAMES if isinstance(getattr(self.sender.index, name), Each))
        axes = [index_axis(site, name) or "" for name in names]
        return names, tuple(table.n_pos(tokens) if axis in ("pos", "query") else table.size(axis) for axis in axes)


def path_patch(
    model: SiteModel,
    sender: str | Node,
    receivers: str | Node | Sequence[str | Node],
    metric: Callable | None = None,
    *,
    through: str | Node | Sequence[str | Node] = (),
    direction: str = "denoising",
    frozen: Sequence[str] | None = None,
    batch_size: int = 16,
) -> PathPatch:
    """Patches the paths from a sender to receivers, and nothing else.

    Args:
      sender: a node or a site; indices marked with `mi.each` sweep over all senders in one program. Of a sender inside
        a held component, such as `attn.q` of a head, the component must be in `through`.
      receivers: where the paths end: inputs of components (`attn.q`, `attn.k`, `attn.v`, `attn.q_in`, `mlp.in`, …),
        or `mi.node("resid_post", layer=last)` for the direct effect on the output.
      metric: from the model's output to a scalar or to one value an example; None returns the outputs.
      through: components that the paths may pass: sites or nodes among `frozen`.
      direction: "denoising" runs corrupt and sends clean values, "noising" (that of the literature) the reverse.
      frozen: the sites that are held at their base value in the second run; by default every attention head and MLP,
        `attn.z` (`attn_out` where a model has no `attn.z`) and `mlp_out`.
      batch_size: senders at once; bounds the memory.

    Returns:
      A function `(clean, corrupt, **options)`. Its result is the output under the patch, or with a metric the change
      of it as `Effects`; the axes that are marked come first.

    Raises:
      InputError: an unknown direction, or, in the call, prompts of different shapes.
      SiteError: a site or place that does not exist, nothing to hold, a receiver that is held, a place of `through`
        that is not, or no path from the sender to any receiver. Paths are checked by the layers and heads that are
        known numbers, at the decoder's sites; a sweep needs one place with a path, the others have effect 0.
    """
    if batch_size < 1:
        raise SiteError(f"batch_size is the number of senders computed at once, at least 1; got {batch_size}")
    table = model.site_table
    check_direction(direction)
    held = _frozen(table, frozen)
    ends = tuple(as_node(place, table) for place in _many(receivers))
    if not ends:
        raise SiteError("path_patch needs at least one receiver, such as mi.node('attn.q', layer=5, head=1)")
    constant = {*held, *(name for site in held for name in _MADE_OF.get(site, ()))}
    for end in ends:
        if end.site in constant:
            raise SiteError(
                f"receiver {end.site!r} is held at its base value, so nothing can reach it; receivers are inputs: "
                "attn.q, attn.k, attn.v, mlp.in or a site of the stream"
            )
    passed = tuple(as_node(place, table) for place in _many(through))
    for place in passed:
        if place.site not in held:
            raise SiteError(f"through names components that are held ({', '.join(held)}), not {place.site!r}")
    for place in (*ends, *passed):
        if any(isinstance(value, Each) for _, value in place.index.items()):
            raise SiteError(f"mi.each marks places of the sender, not of {place.site!r}; leave the index out for all")
    start = as_node(sender, table)
    check_path(table, start, ends, held, passed)
    return PathPatch(model, start, ends, metric, passed, direction, held, batch_size)


def _many(places: str | Node | Sequence[str | Node]) -> tuple[str | Node, ...]:
    return (places,) if isinstance(places, str | Node) else tuple(places)


def _frozen(table: SiteTable, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        attention = next((name for name in ("attn.z", "attn_out") if name in table.names), None)
        found = tuple(name for name in (attention, "mlp_out") if name in table.names)
    else:
        found = tuple(table.resolve(name)[0].name for name in names)
    if not found:
        raise SiteError(
            f"{table.model} has no attn.z, attn_out or mlp_out; name the sites to hold with frozen=…, among "
            f"{', '.join(table.names)}"
        )
    return found
