"""`capture` and `intervene`: a model in, a function with the model's own signature out. They nest in any order."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import equinox as eqx

from mi_jax.core.apply import Taps, check_positions, taps
from mi_jax.core.edits import Edit
from mi_jax.core.errors import lacks
from mi_jax.core.sites import At, SiteError, SiteTable


@runtime_checkable
class SiteModel(Protocol):
    """A pure function from inputs to outputs and to the activations that were asked for.

    `model(inputs, taps=…, capture=…)` returns the output when `capture` is None and `(output, activations)` otherwise.
    """

    @property
    def site_table(self) -> SiteTable: ...

    def __call__(
        self, *inputs, taps: Taps | None = None, capture: Sequence[str | At] | None = None, **options
    ) -> Any: ...


class Intervened(eqx.Module):
    """A model with edits; see `intervene`."""

    model: Any
    edits: Taps
    if not TYPE_CHECKING:
        __getattr__ = lacks

    @property
    def site_table(self) -> SiteTable:
        return self.model.site_table

    def __call__(self, *inputs, taps=None, capture=None, **options):
        merged = dict(self.edits)
        for name, edits in (taps or {}).items():
            merged[name] = (*merged.get(name, ()), *edits)
        return self.model(*inputs, taps=merged, capture=capture, **options)


class Captured(eqx.Module):
    """A model that also returns activations; see `capture`."""

    model: Any
    wanted: tuple[At, ...] = eqx.field(static=True)
    if not TYPE_CHECKING:
        __getattr__ = lacks

    @property
    def site_table(self) -> SiteTable:
        return self.model.site_table

    def __call__(self, *inputs, taps=None, capture=None, **options):
        wanted = self.site_table.normalise((*self.wanted, *(capture or ())))
        return self.model(*inputs, taps=taps, capture=wanted, **options)


def intervene(model: SiteModel, *edits: Edit) -> Intervened:
    """The model under edits, applied in order; nested calls apply the inner edits first.

    Example:
      `logits = mi.intervene(model, mi.patch("attn.z", acts, layer=5, head=3, pos=-1))(corrupt)`

    Raises:
      SiteError: no edits, an unknown site, an index out of range, or a value of the wrong shape.
    """
    if not edits:
        raise SiteError("intervene needs at least one edit, such as mi.ablate('attn_out', layer=0)")
    return Intervened(model, taps(edits, model.site_table))


def capture(model: SiteModel, *specs: str | At) -> Captured:
    """The model, returning `(output, activations)` with the named sites; nothing else is materialised.

    Example:
      `logits, acts = mi.capture(model, "resid_post", mi.at("attn.z", layers=(4, 8)))(tokens)`

    A layered site has a leading `layer` axis. Pass `output=False` in the call where the output is not needed: the
    forward then stops after the last layer asked for and returns None in its place.

    Raises:
      SiteError: an unknown site, or a layer that the model does not have.
    """
    return Captured(model, model.site_table.normalise(specs))


@eqx.filter_jit
def compiled(fn: Callable, args: tuple, options: dict[str, Any]) -> Any:
    """A call of `fn`, itself a pytree, as one program."""
    return fn(*args, **options)


def jit(fn: Callable) -> Callable:
    """A model, or a transform of one, compiled. Its arrays, and those of its edits, are arguments, not constants.

    So another layer, head, position or value, and another model of the same shape, use the same program; a plain
    `jax.jit` of the same call would bake all weights into it.

    Example:
      `logits = mi.jit(mi.intervene(model, mi.ablate("attn.z", layer=5, head=3)))(tokens)`

    Raises:
      SiteError: in the call of a model or a transform, for an edit at a position that the prompts do not have.
    """

    def call(*args, **options):
        prepared = fn
        # of a function of the user's own nobody knows which argument holds the prompts
        prompts = next((x for x in (*args, *options.values()) if getattr(x, "ndim", 0) > 1), None)
        if prompts is not None and (hasattr(fn, "site_table") or hasattr(fn, "prepared")):
            table = getattr(fn, "site_table", None)
            check_positions((fn, options), prompts.shape[1] if table is None else table.n_pos(prompts))
            # what is known before the arrays become arguments may make the program smaller
            prepared = fn.prepared(prompts) if hasattr(fn, "prepared") else fn
        return compiled(prepared, args, options)

    return call
