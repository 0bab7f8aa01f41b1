"""Activations that a language model computes: one forward for several sites, ended after the last layer asked for."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.core.sites import At, SiteError, SiteTable
from mi_jax.core.transforms import SiteModel, capture
from mi_jax.data.activations.massive import massive_limit, norms
from mi_jax.data.activations.shuffled import Chunk
from mi_jax.data.activations.usable import usable_tokens
from mi_jax.data.activations.window import Activations
from mi_jax.run.fingerprint import fingerprint


class ModelSource:
    """A model's activations on contexts; a unit is a context. See `ActivationStream` for the arguments."""

    def __init__(
        self,
        model: SiteModel,
        tokens: Int[np.ndarray, "context pos"] | Int[Array, "context pos"],
        sites: str | At | Sequence[str | At],
        *,
        mask: Bool[np.ndarray, "context pos"] | None = None,
        special_ids: SupportsIndex | Iterable[SupportsIndex] = (),
        skip_positions: int = 1,
        outlier_ratio: float | None = 10.0,
        contexts_per_chunk: int = 32,
        dtype: Any = None,
        mesh: Mesh | None = None,
    ):
        """Raises InputError for tokens that cannot be used, SiteError for sites without a value per token."""
        tokens = np.asarray(tokens)
        self.sites = _per_token(model.site_table, sites)
        _check_tokens(model.site_table, tokens, contexts_per_chunk, outlier_ratio)
        self.model, self.tokens, self.mesh = model, tokens.astype(np.int32), mesh
        self.mask = None if mask is None else np.asarray(mask, bool)
        self.units_per_chunk = contexts_per_chunk
        self.outlier_ratio, self.dtype = outlier_ratio, dtype
        self._usable = usable_tokens(tokens, mask=mask, special_ids=special_ids, skip_positions=skip_positions)
        self.counts: np.ndarray = self._usable.sum(1)

    @property
    def what(self) -> str:
        n, length = self.tokens.shape
        return f"a corpus of {n} contexts of {length} tokens"

    def usable(self, units: Int[np.ndarray, " unit"]) -> Bool[np.ndarray, "unit pos"]:
        return self._usable[units]

    def start(self, units: Int[np.ndarray, " unit"]) -> Callable[[], Chunk]:
        """Dispatches the forward; jax computes it while the caller goes on."""
        chunk = _forward(*self._arguments(units))
        return lambda: Chunk(*chunk)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """By site, the shape and type of one row."""
        rows, _ = eqx.filter_eval_shape(_forward, *self._arguments(np.zeros(self.units_per_chunk, np.int64)))
        return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in rows.values.items()}

    def layers(self) -> dict[str, int | tuple[int, ...] | None]:
        """By site, the layer that a row holds, or those along its first axis."""
        table, every = self.model.site_table, {}
        for spec in self.sites:
            layered = table.resolve(spec.site)[0].layered
            every[spec.site] = tuple(range(table.size("layer"))) if layered and spec.layers is None else spec.layers
        return every

    def identity(self) -> dict[str, Any]:
        """The model with its weights, the corpus, what is captured, and what is left out."""
        config = getattr(self.model, "config", None)
        fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
        return {
            "model": self.model.site_table.model,
            "config": {field.name: repr(getattr(config, field.name)) for field in fields},
            "weights": fingerprint(self.model),
            "sites": {spec.site: list(n) if isinstance(n := spec.layers, tuple) else n for spec in self.sites},
            "tokens": _digest(self.tokens),
            "mask": None if self.mask is None else _digest(self.mask),
            "usable": _digest(self._usable),
            "outlier_ratio": self.outlier_ratio,
            "contexts_per_chunk": self.units_per_chunk,
            "dtype": None if self.dtype is None else np.dtype(self.dtype).name,
        }

    def failure(self, unit: int) -> str:
        names = ", ".join(f"{spec.site}" for spec in self.sites)
        return (
            f"the activations of context {unit} ({names} of {self.model.site_table.model}) are not finite; look at its "
            "tokens, or run the model in float32 or bfloat16 if it overflows"
        )

    def _arguments(self, units: np.ndarray) -> tuple:
        inputs = {"tokens": self.tokens[units], "usable": self._usable[units]}
        inputs |= {} if self.mask is None else {"mask": self.mask[units]}
        placed = {name: jax.device_put(x, self._sharding(x)) for name, x in inputs.items()}
        number = jax.device_put(units.astype(np.int32))
        return self.model, placed, number, self.sites, self.outlier_ratio, self.dtype

    def _sharding(self, x: np.ndarray) -> NamedSharding | None:
        return (
            None if self.mesh is None else NamedSharding(self.mesh, sharding.spec(("batch", "pos"), x.shape, self.mesh))
        )


def _digest(x: np.ndarray) -> str:
    return f"{list(x.shape)} {hashlib.blake2b(np.ascontiguousarray(x).data, digest_size=16).hexdigest()}"


@eqx.filter_jit
def _forward(
    model: SiteModel,
    inputs: dict[str, Array],
    units: Int[Array, " context"],
    sites: tuple[At, ...],
    outlier_ratio: float | None,
    dtype: Any,
) -> tuple[Activations, Bool[Array, " context"]]:
    """The rows of a chunk, context after context, and whether the usable ones of each context are finite."""
    options = {"mask": inputs["mask"]} if "mask" in inputs else {}
    _, acts = capture(model, *sites)(inputs["tokens"], output=False, **options)
    table, usable = model.site_table, inputs["usable"]
    n_rows = usable.size
    values, finite, valid = {}, jnp.ones(usable.shape[0], bool), jnp.ones(n_rows, bool)
    for spec in sites:
        x = acts[spec.site].astype(dtype or acts[spec.site].dtype)
        layered = has_layer_axis(table, spec)
        x = jnp.moveaxis(x, 0, 2) if layered else x
        per_layer = x.reshape(n_rows, x.shape[2] if layered else 1, -1)
        finite &= (jnp.isfinite(per_layer).all((1, 2)).reshape(usable.shape) | ~usable).all(1)
        if outlier_ratio is not None:
            limit_of = jax.vmap(lambda sizes: massive_limit(sizes, outlier_ratio, usable.reshape(-1)), in_axes=1)
            sizes = norms(per_layer)
            valid &= ~(sizes > limit_of(sizes)[None, :]).any(1)
        values[spec.site] = x.reshape(n_rows, *x.shape[2:])
    length = usable.shape[1]
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), usable.shape[0])
    return Activations(values, valid, jnp.repeat(units, length), position), finite


def has_layer_axis(table: SiteTable, spec: At) -> bool:
    """Whether a row of this site holds several layers, `[layer …]`."""
    return table.resolve(spec.site)[0].layered and not isinstance(spec.layers, int)


def _per_token(table: SiteTable, sites: str | At | Sequence[str | At]) -> tuple[At, ...]:
    specs = table.normalise(sites)
    if not specs:
        raise SiteError("name at least one site, such as mi.at('resid_post', layers=4)")
    for spec in specs:
        axes = table.resolve(spec.site)[0].slice_axes
        if axes[:2] != ("batch", "pos"):
            raise SiteError(f"site {spec.site!r} has axes {' '.join(axes)}: no value per token to make a batch of")
    return specs


def _check_tokens(table: SiteTable, tokens: np.ndarray, contexts_per_chunk: int, outlier_ratio: float | None) -> None:
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"tokens are integers [context pos]; got {tokens.dtype} of shape {tokens.shape}")
    if not tokens.size:
        raise InputError(f"the corpus is empty: tokens have shape {tokens.shape}")
    if contexts_per_chunk < 1:
        raise InputError(f"contexts_per_chunk={contexts_per_chunk}; a chunk has at least one context")
    if outlier_ratio is not None and outlier_ratio <= 1:
        raise InputError(f"outlier_ratio={outlier_ratio:g} would drop half of all rows; it is over 1, or None for all")
    n_vocab = dict(table.sizes).get("d_vocab")
    if n_vocab is not None and not (tokens.min() >= 0 and tokens.max() < n_vocab):
        context = int(np.argmax(((tokens < 0) | (tokens >= n_vocab)).any(1)))
        raise InputError(
            f"context {context} has a token outside the vocabulary of {table.model} (0–{n_vocab - 1}); "
            "was the text tokenised for another model?"
        )
