"""`Effects`: how much each node moves a metric, with the direction of the patch and how the figures were got.

*Denoising* runs the corrupt prompt and puts clean values in; *noising* runs the clean prompt and puts corrupt values
in. The two are not negatives of each other: a node that another one backs up has no effect when noised and may have a
large one when denoised. So the direction is part of the result.
"""

from typing import Any

import equinox as eqx
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened

DIRECTIONS = ("denoising", "noising")


class Agreement(eqx.Module):
    """A figure of agreement with exact patching.

    NaN throughout where a score or an exact effect is not finite.

    Attributes:
      value: on the sampled nodes.
      ci_low, ci_high: 95 % bootstrap interval over the sampled nodes.
      null: what randomly permuted scores exceed once in 40 times.
    """

    value: Float[Array, "*copies"]
    ci_low: Float[Array, "*copies"]
    ci_high: Float[Array, "*copies"]
    null: Float[Array, "*copies"]


class Check(eqx.Module):
    """Scores beside exact patching on a random sample of nodes.

    Attributes:
      scores, exact: of the sampled nodes.
      rank_correlation: Spearman's; of the absolute exact effects where the scores have no sign.
      sign_agreement: share of the nodes with an exact effect whose score has its sign; None where scores have no sign.
    """

    scores: Float[Array, "*copies node"]
    exact: Float[Array, "*copies node"]
    rank_correlation: Agreement
    sign_agreement: Agreement | None


class Effects(eqx.Module):
    """The change of the metric per node, `{site: array}`, with axes in the order layer, pos, head, unit.

    Attributes:
      baseline: the metric of the run that is patched.
      target: the metric of the run that the values come from.
      direction: "denoising" (corrupt run, clean values) or "noising" (clean run, corrupt values).
      method: how the figures were got, such as "atp" or "exact"; `mi.attribute` lists them.
      axes: the axes of every site's array.
      check: agreement with exact patching on a sample, where it was asked for.
      completeness_gap: for "ig", the sum of the scores of `embed` minus (target − baseline): the error of the integral
        with these `steps`. None for other methods.
    """

    values: dict[str, Float[Array, "..."]]
    baseline: Float[Array, "*copies"]
    target: Float[Array, "*copies"]
    direction: str = eqx.field(static=True)
    method: str = eqx.field(static=True)
    axes: tuple[tuple[str, tuple[str, ...]], ...] = eqx.field(static=True)
    check: Check | None = None
    completeness_gap: Float[Array, "*copies"] | None = None

    def __getitem__(self, site: str) -> Float[Array, "..."]:
        if site not in self.values:
            raise InputError(f"these effects are of {', '.join(self.values)}, not of {site!r}")
        return self.values[site]

    def top(self, k: int = 10) -> list[tuple[str, dict[str, int], float]]:
        """The k nodes of largest absolute effect, as `(site, {axis: index}, effect)`; for one result, outside jit."""
        found = []
        for site, axes in self.axes:
            values = np.asarray(self.values[site], np.float64)
            for flat in np.argsort(-np.abs(values), axis=None, kind="stable")[:k]:
                place = np.unravel_index(flat, values.shape)
                index = dict(zip(axes, (int(i) for i in place), strict=True))
                found.append((site, index, float(values[place])))
        return sorted(found, key=lambda node: -abs(node[2]))[:k]

    def __repr__(self) -> str:
        sites = []
        for site, axes in self.axes:
            shape = self.values[site].shape
            sizes = zip(axes, shape[len(shape) - len(axes) :], strict=True)
            sites.append(" ".join([site, *(f"{axis}={n}" for axis, n in sizes)]))
        figures = f"baseline={_figure(self.baseline)}, target={_figure(self.target)}"
        gap = "" if self.completeness_gap is None else f", completeness_gap={_figure(self.completeness_gap)}"
        checked = "" if self.check is None else f", rank_correlation={_figure(self.check.rank_correlation.value)}"
        return (
            f"Effects(method={self.method!r}, direction={self.direction!r}, {figures}{gap}{checked}, "
            f"of {', '.join(sites)})"
        )


def _figure(x: Any) -> str:
    if isinstance(x, jax.core.Tracer) or not hasattr(x, "ndim"):
        return str(x)
    return f"{float(x):.4g}" if x.ndim == 0 else f"<{x.shape}>"


def check_direction(direction: str) -> None:
    """Raises InputError for an unknown direction."""
    if direction not in DIRECTIONS:
        raise InputError(f"direction must be 'denoising' or 'noising', got {direction!r}")


def base_and_source(
    clean: Shaped[Array, "..."], corrupt: Shaped[Array, "..."], direction: str
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    """The prompts that are run and those that the values come from.

    Raises:
      InputError: prompts of different shapes.
    """
    if clean.shape != corrupt.shape:
        raise InputError(
            f"clean and corrupt prompts align token by token; got shapes {clean.shape} and {corrupt.shape}: "
            "pad both to the same length and pass a mask"
        )
    return (corrupt, clean) if direction == "denoising" else (clean, corrupt)


def mean_metric(value: Any) -> Float[Array, ""]:
    """The mean over examples of what a metric gave, one value an example or a scalar."""
    return widened(jnp.asarray(value)).mean()
