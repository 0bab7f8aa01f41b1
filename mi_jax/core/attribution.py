"""`attribute`: how much every node moves a metric, estimated from gradients or patched exactly.

For a node with value z on the run that is patched and z' on the run that the values come from, and a metric m:

`"atp"`: attribution patching, `(z' − z) · ∂m/∂z` (Nanda 2023). Two forwards and one backward for all nodes.
`"atp+qk"`: the same with the QK fix at `attn.q` and `attn.k` (`mi_jax.core.atp`), at the same cost.
`"atp*"`: QK fix and GradDrop (Kramár et al. 2024), magnitudes without sign. As many backwards as layers.
`"ig"`: `(z' − z)` times the mean of `∂m/∂z` over runs on the line between the two embeddings (EAP-IG-inputs, Hanna et
al. 2024). `steps` backwards.
`"ig-activations"`: the same with the mean over the line from z to z', the site of one layer at a time, the rest of the
model following. Steps × layers × sites backwards.
`"exact"`: m with the node patched, minus m. One run a node, in one program (`mi.sweep`).

Integrals are taken by Gauss–Legendre quadrature with `steps` points. Completeness: with `"ig"` the scores of the site
`embed` add up to m of the other run minus m of this one, and `Effects.completeness_gap` says by how much they miss it
(often some percent with 8 steps; take more where that matters). With `"ig-activations"` those of any site in one layer
add up to the effect of patching that site in that layer.

A dot product is over whatever is not in `axes`: examples, components, and positions or heads that are left out.
`"exact"` patches those together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from mi_jax.core.atp import grad_drop, key_effects, query_effects
from mi_jax.core.certify import certify
from mi_jax.core.edits import Edit, Patch
from mi_jax.core.effects import Effects, base_and_source, check_direction, mean_metric
from mi_jax.core.errors import InputError
from mi_jax.core.gradients import Acts, gradient_factor, site_gradients
from mi_jax.core.index import Index, each
from mi_jax.core.nodes import node_axes, sum_to_nodes
from mi_jax.core.precision import widened
from mi_jax.core.sites import LAYER, SiteError
from mi_jax.core.sweeps import sweep
from mi_jax.core.transforms import SiteModel

METHODS = ("atp", "atp+qk", "atp*", "ig", "ig-activations", "exact")
_QK_SITES = ("attn.q", "attn.k")
_QK_NEEDS = ("attn.q", "attn.k", "attn.scores", "attn.pattern")


class Attribution(eqx.Module):
    """See `attribute`."""

    model: SiteModel
    metric: Callable
    sites: tuple[str, ...] = eqx.field(static=True)
    method: str = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    direction: str = eqx.field(static=True)
    axes: tuple[str, ...] = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    check: int = eqx.field(static=True)

    def __call__(
        self,
        clean: Shaped[Array, "batch *input"],
        corrupt: Shaped[Array, "..."],
        *,
        key: PRNGKeyArray | None = None,
        **options,
    ) -> Effects:
        base, source = base_and_source(clean, corrupt, self.direction)
        if self.check and key is None:
            raise InputError(f"check={self.check} draws nodes at random: pass key=jax.random.key(…) in the call")
        needed = self._needed()
        output, to = self.model(source, capture=needed, **options)
        target = mean_metric(self.metric(output))
        gap = None
        if self.method in ("atp", "atp+qk", "atp*"):
            baseline, values = self._patching(base, to, options, needed)
        elif self.method == "exact":
            baseline, values = self._exact(base, to, options)
        else:
            output, at = self.model(base, capture=needed, **options)
            baseline = mean_metric(self.metric(output))
            if self.method == "ig":
                values, total = self._inputs(base, at, to, options)
                gap = total - (target - baseline)
            else:
                values = self._activations(base, at, to, options)
        axes = tuple((s, self._axes(s)) for s in self.sites)
        effects = Effects(values, baseline, target, self.direction, self.method, axes, completeness_gap=gap)
        if not self.check or key is None:
            return effects
        return certify(
            effects,
            self.model,
            self.metric,
            base,
            {name: to[name] for name in self.sites},
            options,
            n_nodes=self.check,
            signed=self.method != "atp*",
            batch_size=self.batch_size,
            key=key,
        )

    def _axes(self, name: str) -> tuple[str, ...]:
        return node_axes(self.model.site_table.resolve(name)[0], self.axes)

    def _needed(self) -> tuple[str, ...]:
        more = _QK_NEEDS if self._fixed() else ("embed",) if self.method == "ig" else ()
        return tuple(dict.fromkeys((*self.sites, *more)))

    def _fixed(self) -> tuple[str, ...]:
        """Sites that are scored with the QK fix."""
        return tuple(s for s in self.sites if s in _QK_SITES) if self.method in ("atp+qk", "atp*") else ()

    def _dot(self, name: str, start: Array, end: Array, gradient: Array) -> Float[Array, "..."]:
        site, _ = self.model.site_table.resolve(name)
        return sum_to_nodes(_difference(start, end) * widened(gradient), site, self._axes(name))

    def _patching(self, base: Array, to: Acts, options: Mapping[str, Any], needed: tuple[str, ...]):
        def scored(gates: Mapping[str, tuple[Edit, ...]]):
            value, at, gradients = site_gradients(self.model, self.metric, needed, base, options, after=gates)
            scores = {}
            for name in self.sites:
                if name not in self._fixed():
                    scores[name] = self._dot(name, at[name], to[name], gradients[name])
                    continue
                pattern = (at["attn.scores"], gradients["attn.pattern"], self.model.site_table.attention)
                if name == "attn.q":
                    fixed = query_effects(to[name], at["attn.k"], *pattern)
                else:
                    fixed = key_effects(at["attn.q"], to[name], *pattern)
                site, _ = self.model.site_table.resolve(name)
                scores[name] = sum_to_nodes(widened(fixed)[..., None], site, self._axes(name))
            return value, scores

        if self.method != "atp*":
            return scored({})
        values = grad_drop(lambda gates: scored(gates)[1], self.model.site_table)
        return mean_metric(self.metric(self.model(base, **options))), values

    def _inputs(self, base: Array, at: Acts, to: Acts, options: Mapping[str, Any]) -> tuple[dict[str, Array], Array]:
        """The scores, and the sum of those of `embed`, whose gradient the same backward pass gives."""
        sites = tuple(dict.fromkeys((*self.sites, "embed")))

        def gradient(alpha):
            embed = _between(at["embed"], to["embed"], alpha)
            before = {"embed": (Patch("embed", Index(), embed),)}
            return site_gradients(self.model, self.metric, sites, base, options, before=before)[2]

        mean = self._integral(gradient)
        total = (_difference(at["embed"], to["embed"]) * widened(mean["embed"])).sum()
        return {name: self._dot(name, at[name], to[name], mean[name]) for name in self.sites}, total

    def _activations(self, base: Array, at: Acts, to: Acts, options: Mapping[str, Any]) -> dict[str, Array]:
        factor = gradient_factor(base)

        def mean_gradient(name, layer, start, end):
            def metric_at(value):
                taps = {name: (Patch(name, Index(layer=layer), value),)}
                return factor * mean_metric(self.metric(self.model(base, taps=taps, **options)))

            mean = self._integral(lambda alpha: jax.grad(metric_at)(_between(start, end, alpha)))
            return mean / factor

        scores = {}
        for name in self.sites:
            if self.model.site_table.resolve(name)[0].layered:
                layers = jnp.arange(self.model.site_table.size(LAYER), dtype=jnp.int32)
                rows = (layers, at[name], to[name])
                mean = jax.lax.map(lambda row, name=name: mean_gradient(name, *row), rows)
            else:
                mean = mean_gradient(name, None, at[name], to[name])
            scores[name] = self._dot(name, at[name], to[name], mean)
        return scores

    def _integral(self, gradient: Callable[[Array], Any]) -> Any:
        """The mean of a gradient over α in [0, 1]."""
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        points = (jnp.asarray((nodes + 1) / 2), jnp.asarray(weights / 2))

        def at(alpha):
            return jax.tree.map(widened, gradient(alpha))

        def add(total, point):
            return jax.tree.map(lambda t, g: t + point[1].astype(g.dtype) * g, total, at(point[0])), None

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(at, points[0][0]))
        return jax.lax.scan(add, zeros, points)[0]

    def _exact(self, base: Array, to: Acts, options: Mapping[str, Any]):
        def metric(output):
            return mean_metric(self.metric(output))

        baseline = metric(self.model(base, **options))
        values = {}
        for name in self.sites:
            axes = self._axes(name)
            edit = Patch(name, Index().replace(**dict.fromkeys(axes, each)), to[name])
            if axes:
                patched = sweep(self.model, edit, metric, batch_size=self.batch_size)(base, **options)
            else:
                patched = metric(self.model(base, taps={name: (edit,)}, **options))
            values[name] = patched - baseline
        return baseline, values


def _difference(start: Array, end: Array) -> Array:
    """Exact for neighbours in half precision, whose own difference would be rounded."""
    return widened(end) - widened(start)


def _between(start: Array, end: Array, alpha: Array) -> Array:
    difference = _difference(start, end)
    return (widened(start) + alpha.astype(difference.dtype) * difference).astype(start.dtype)


def attribute(
    model: SiteModel,
    metric: Callable,
    sites: str | Sequence[str] = ("attn.z", "mlp_out"),
    *,
    method: str = "atp",
    steps: int = 8,
    direction: str = "denoising",
    axes: Sequence[str] = ("layer", "pos", "head"),
    batch_size: int = 16,
    check: int = 0,
) -> Attribution:
    """How much each node of some sites moves a metric when it carries the other run's value.

    Args:
      metric: from the model's output to a scalar, or to one value an example, of which the mean is taken.
      sites: sites of the model, or TransformerLens names without a layer.
      method: see the table above; all have the same result type, so they can be compared.
      steps: points of the integral, for "ig" and "ig-activations".
      direction: "denoising" patches clean values into the corrupt run, "noising" corrupt ones into the clean run.
      axes: what makes a node, among layer, pos, head and unit; each site uses those that it has.
      batch_size: nodes patched at once, for "exact" and for the check; bounds the memory.
      check: patch so many randomly drawn nodes exactly too and report the agreement; needs `key` in the call.

    Returns:
      A function `(clean, corrupt, *, key=None, **options)` with the result `Effects`; the options go to the model.

    Raises:
      SiteError: a site or an axis that does not exist, or a site without what the method needs.
      InputError: an unknown method or direction, or fewer steps or nodes at once than one.

    Example:
      `effects = mi.jit(mi.attribute(model, metric, method="ig"))(clean, corrupt)`
    """
    table = model.site_table
    named = []
    for name in (sites,) if isinstance(sites, str) else sites:
        site, layer = table.resolve(name)
        if layer is not None:
            raise SiteError(f"{name!r} names its layer; attribution is over all layers: use {site.name!r}")
        node_axes(site, tuple(axes))
        named.append(site.name)
    if not named:
        raise SiteError("attribute needs at least one site, such as 'attn.z'")
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    check_direction(direction)
    if steps < 1 or check < 0:
        raise InputError(f"steps must be at least 1 and check at least 0, got steps={steps}, check={check}")
    if batch_size < 1:
        raise InputError(f"batch_size is the number of nodes patched at once, at least 1; got {batch_size}")
    attribution = Attribution(
        model, metric, tuple(dict.fromkeys(named)), method, steps, direction, tuple(axes), batch_size, check
    )
    for name in attribution._needed():
        if name not in table.names:
            raise SiteError(f"method {method!r} needs the site {name!r}; {table.model} has {', '.join(table.names)}")
    for name in attribution._fixed():
        if "unit" in attribution._axes(name):
            raise SiteError(f"method {method!r} patches a whole query or key at {name!r}: leave 'unit' out of axes")
    return attribution
