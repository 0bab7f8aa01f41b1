"""What `fit_das` works on, checked: where the answer is read, the site, and the layers and positions of the cells."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mi_jax.circuits.das.program import Setup, model_inputs, source_values
from mi_jax.circuits.das.triples import Triples
from mi_jax.core.errors import InputError
from mi_jax.core.index import Each
from mi_jax.core.sites import At, SiteError
from mi_jax.core.transforms import Intervened, SiteModel
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder

Positions = Each | int | str | Sequence[int | str]


def readable(model: SiteModel, parts: list[Triples]) -> list[Triples]:
    """Fills in where the answer is read, and checks the labels against the model's output.

    Raises:
      InputError: inputs of several shapes, a model without logits, a label that is none of its outputs, or no position
        to read at in a model whose last position is like any other.
    """
    out = []
    config = _config(model)
    if config is not None and config.head == "none":
        raise InputError(
            f"{config.name} is an encoder without an unembedding: its output is the last stream, and DAS compares "
            "logits with labels; load it with a head, or give a model that returns logits of the labels"
        )
    for part in parts:
        if part.base.shape[1:] != parts[0].base.shape[1:]:
            raise InputError(
                f"all triples must have inputs of one shape, got {part.base.shape[1:]} beside "
                f"{parts[0].base.shape[1:]}; pad the prompts to one length and give the mask"
            )
        shape = eqx.filter_eval_shape(lambda m, t: m(*model_inputs(t)), model, part).shape
        if len(shape) not in (2, 3):
            raise InputError(f"DAS needs logits [batch d_vocab] or [batch pos d_vocab]; the model returns {shape}")
        low, high = int(np.min(part.label)), int(np.max(part.label))
        if low < 0 or high >= shape[-1]:
            raise InputError(f"labels must be from 0 to {shape[-1] - 1}, the model's outputs; got {low} to {high}")
        position = part.position
        if len(shape) == 2:
            position = None
        elif position is None:
            _check_last(model, config)
            mask = np.ones(shape[:2], bool) if part.mask is None else np.asarray(part.mask)
            position = jnp.asarray(mask.sum(1).astype(np.int32) - 1)
        out.append(Triples(part.base, part.source, part.label, part.mask, position, part.places))
    return out


def _config(model: SiteModel) -> DecoderConfig | None:
    """Of the native decoder under all edits, None for other models."""
    while isinstance(model, Intervened):
        model = model.model
    return model.config if isinstance(model, Decoder) else None


def _check_last(model: SiteModel, config: DecoderConfig | None) -> None:
    """Raises InputError where the last position does not see the whole input by virtue of its place."""
    table = model.site_table
    if config is not None and config.patches is not None:
        raise InputError(
            f"{table.model} reads images and has logits at every patch; say where the answer is read, such as "
            "Triples(…, position=jnp.zeros(n, jnp.int32)), the class token, where classifiers are trained to answer"
        )
    if not table.attention.causal:
        raise InputError(
            f"{table.model} has no causal mask, so no position is the one that answers; say where the answer of every "
            "triple is read, such as Triples(…, position=…) with the masked token's"
        )


def site_of(
    model: SiteModel, triples: Triples, name: str, layers: Each | int | Sequence[int]
) -> tuple[str, tuple[int, ...] | None, int | None, int]:
    """The canonical site, its layers, the number of positions (None without that axis), and the width."""
    table = model.site_table
    site, named = table.resolve(name)
    if named is not None:
        if not isinstance(layers, Each):
            raise SiteError(f"{name!r} names its layer; leave layers=… out, or use {site.name!r}")
        layers = named
    axes = site.slice_axes
    if axes[0] != "batch" or axes[1:-1] not in ((), ("pos",)):
        raise SiteError(
            f"DAS rotates the last axis of a site [layer] batch [pos] d_model; {site.name!r} has axes "
            f"{' '.join(site.axes)}; choose {', '.join(s.name for s in table.sites if s.slice_axes[1:-1] == ('pos',))}"
        )
    chosen: tuple[int, ...] | None = None
    if site.layered:
        every = range(table.size("layer"))
        chosen = tuple(every if isinstance(layers, Each) else np.atleast_1d(np.asarray(layers)).tolist())
    elif not isinstance(layers, Each):
        raise SiteError(f"site {site.name!r} of {table.model} exists once, not per layer; got layers={layers}")
    if chosen is not None and len(set(chosen)) < len(chosen):
        raise SiteError(f"a layer is given twice: layers={chosen}")
    table.normalise([At(site.name, chosen)])
    positioned = len(axes) == 3
    setup = Setup(site.name, chosen, positioned, 1, 1, 1, 1.0, 1, None)
    shape = eqx.filter_eval_shape(source_values, model, triples, setup).shape
    return site.name, chosen, shape[2] if positioned else None, shape[-1]


def position_names(positions: Positions, site: str, n_pos: int | None) -> tuple[int | str | None, ...]:
    """The positions of the cells as they were given; all for `mi.each`, (None,) where the site has none."""
    if n_pos is None:
        if not isinstance(positions, Each):
            raise SiteError(f"site {site!r} has no positions; leave positions=… out")
        return (None,)
    if isinstance(positions, Each):
        return tuple(range(n_pos))
    names = (positions,) if isinstance(positions, int | str) else tuple(positions)
    if not names or len(set(names)) < len(names):
        raise SiteError(f"positions must be one or more, each given once; got {names}")
    for one in names:
        if isinstance(one, int) and not -n_pos <= one < n_pos:
            raise SiteError(f"site {site!r} has {n_pos} positions (0–{n_pos - 1}); got {one}")
    if len({one % n_pos if isinstance(one, int) else one for one in names}) < len(names):
        raise SiteError(f"of {n_pos} positions, {names} names one twice: a negative one counts from the end")
    return names


def places(triples: Triples, names: Sequence[int | str | None], n_pos: int | None) -> Int[Array, "place batch"]:
    """The position of every cell in every triple."""
    n, out = len(triples), []
    for name in names:
        if isinstance(name, str):
            if name not in triples.places:
                named = ", ".join(triples.places) or "none"
                raise SiteError(f"the triples have no position named {name!r}; they have {named}")
            row = np.asarray(triples.places[name])
            if n_pos is not None and (row.min() < -n_pos or row.max() >= n_pos):
                raise SiteError(f"position {name!r} goes from {row.min()} to {row.max()}; there are {n_pos} positions")
        else:
            row = np.full((n,), name or 0)
        out.append(row.astype(np.int32))
    return jnp.asarray(np.stack(out))
