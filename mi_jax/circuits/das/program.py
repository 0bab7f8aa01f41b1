"""The two compiled programs of distributed alignment search: training all cells at once, and scoring them.

A cell is a layer and a position. One `lax.scan` over the steps holds the rotations of all cells and one optimiser
state; each step runs the source once and the base once per cell, `cells_at_once` of them side by side. Seeds are
vmapped.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from mi_jax.circuits.das.subspace import Boundary, kept_columns, orthonormal, root_gates
from mi_jax.circuits.das.triples import Triples
from mi_jax.core.edits import Edit, patch
from mi_jax.core.index import Index, Places, per_example
from mi_jax.core.sites import At
from mi_jax.core.subspaces import SwapSubspace
from mi_jax.core.transforms import SiteModel, intervene
from mi_jax.models.decoder import Decoder
from mi_jax.models.training import updated


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is static in both programs.

    Attributes:
      layers: None for a site that exists once.
      positioned: whether the site has a position axis.
    """

    site: str
    layers: tuple[int, ...] | None
    positioned: bool
    k: int
    steps: int
    batch_size: int
    learning_rate: float
    cells_at_once: int
    boundary: Boundary | None


class Rotation(eqx.Module):
    """The trained part: orthonormal columns and, in boundless DAS, the share of them that is swapped."""

    basis: Float[Array, "*cell d_model k"]
    boundary: Float[Array, "*cell"] | None

    def columns(self) -> Float[Array, "*cell d_model k"]:
        """The columns after the training: those outside the boundary are 0."""
        if self.boundary is None:
            return self.basis
        kept = kept_columns(self.boundary, self.basis.shape[-1])
        return self.basis * jnp.broadcast_to(kept[..., None, :], self.basis.shape)


MakeEdit = Callable[[str, Any, Array, Array | None, Array | Places | None], Edit]


def swap(site: str, basis: Float[Array, "d_model k"], value: Array, layer: Array | None, pos: Any) -> Edit:
    """`h + (value − h) B Bᵀ` with B as it is; `mi.swap_subspace` would make gated columns orthonormal again."""
    return SwapSubspace(site, Index.of(layer=layer, pos=pos), (basis, value))


def whole_site(site: str, _: Array, value: Array, layer: Array | None, pos: Any) -> Edit:
    """The interchange of all dimensions."""
    return patch(site, value, layer=layer, pos=pos)


def output_logits(model: SiteModel, triples: Triples, *edits: Edit) -> Float[Array, "batch d_vocab"]:
    """Logits where the answer is read, in float32."""
    run = intervene(model, *edits) if edits else model
    if triples.position is None:
        return run(*model_inputs(triples)).astype(jnp.float32)
    if isinstance(model, Decoder):
        return run(*model_inputs(triples), output_pos=triples.position)[:, 0].astype(jnp.float32)
    logits = run(*model_inputs(triples))
    return jnp.take_along_axis(logits, triples.position[:, None, None], 1)[:, 0].astype(jnp.float32)


def model_inputs(triples: Triples, *, source: bool = False) -> tuple[Array, ...]:
    """The positional arguments of the model."""
    tokens = triples.source if source else triples.base
    return (tokens,) if triples.mask is None else (tokens, triples.mask)


def source_values(model: SiteModel, triples: Triples, setup: Setup) -> Float[Array, "layer batch *pos d_model"]:
    """The site in the source runs, at the layers of the setup."""
    _, acts = model(*model_inputs(triples, source=True), capture=(At(setup.site, setup.layers),))
    return acts[setup.site][None] if setup.layers is None else acts[setup.site]


def _cells(setup: Setup, n_places: int) -> tuple[Int[Array, " cell"], Int[Array, " cell"]]:
    """Row of the captured layers, and row of the positions, of every cell."""
    n_layers = 1 if setup.layers is None else len(setup.layers)
    layer, place = jnp.divmod(jnp.arange(n_layers * n_places, dtype=jnp.int32), n_places)
    return layer, place


def _edit(setup: Setup, make: MakeEdit, operand: Any, values: Array, row: Array, pos: Array) -> Edit:
    layer = None if setup.layers is None else jnp.asarray(setup.layers, jnp.int32)[row]
    place = None if not setup.positioned else per_example(pos) if pos.ndim else pos
    return make(setup.site, operand, values[row], layer, place)


def _optimiser(setup: Setup, d_model: int) -> optax.GradientTransformation:
    """Adam with a rate of its own for columns and boundary, both falling to 0 along half a cosine."""

    def at_rates(updates: Any, _: Any) -> Any:
        # entries of a unit column are of size d_model^(-1/2), so this rate is about the angle turned in one step
        basis = -setup.learning_rate * d_model**-0.5 * updates.basis
        if setup.boundary is None or updates.boundary is None:
            return Rotation(basis, None)
        return Rotation(basis, -setup.boundary.learning_rate * updates.boundary)

    decay = optax.cosine_decay_schedule(1.0, max(setup.steps - 1, 1))
    return optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(decay), optax.stateless(at_rates))


@eqx.filter_jit
def train(
    model: SiteModel,
    triples: Triples,
    places: Int[Array, "place batch"],
    labels: Int[Array, "seed batch"],
    keys: Key[Array, " seed"],
    setup: Setup,
    d_model: int,
) -> tuple[Float[Array, "seed cell d_model k"], Float[Array, "seed step cell"]]:
    """Minimises the cross-entropy of the labels under the interchange, in every cell and for every seed.

    Returns:
      The columns, those outside the boundary 0, and the losses.
    """
    rows, columns = _cells(setup, places.shape[0])
    n_cells, n = rows.shape[0], len(triples)
    optimiser: Any = _optimiser(setup, d_model)

    def loss(rotation: Rotation, batch, values, labels, row, pos, progress):
        basis, penalty = orthonormal(rotation.basis), 0.0
        if setup.boundary is not None and rotation.boundary is not None:
            gates = root_gates(rotation.boundary, setup.boundary.temperature_at(progress), setup.k)
            basis, penalty = basis * gates[None, :], setup.boundary.weight * rotation.boundary
        edit = _edit(setup, swap, basis, values, row, pos)
        nll = optax.softmax_cross_entropy_with_integer_labels(output_logits(model, batch, edit), labels)
        return nll.mean() + penalty, nll.mean()

    def one_seed(key: PRNGKeyArray, labels: Array):
        k_start, k_order = jax.random.split(key)
        start = orthonormal(jax.random.normal(k_start, (n_cells, d_model, setup.k), jnp.float32))
        boundary = None if setup.boundary is None else jnp.full((n_cells,), setup.boundary.start, jnp.float32)
        rotation = Rotation(start, boundary)

        def step(carry, i):
            rotation, state = carry
            progress = i.astype(jnp.float32) / max(setup.steps - 1, 1)
            chosen = jax.random.randint(jax.random.fold_in(k_order, i), (setup.batch_size,), 0, n, jnp.int32)
            batch, values = triples[chosen], source_values(model, triples[chosen], setup)

            def of_cell(cell):
                one, row, column = cell
                pos = places[column][chosen]
                (_, nll), grads = jax.value_and_grad(loss, has_aux=True)(
                    one, batch, values, labels[chosen], row, pos, progress
                )
                return nll, grads

            nll, grads = jax.lax.map(of_cell, (rotation, rows, columns), batch_size=setup.cells_at_once)
            rotation, state = updated(optimiser, grads, state, rotation)
            boundary = None if rotation.boundary is None else jnp.clip(rotation.boundary, 0.0, 1.0)
            return (Rotation(orthonormal(rotation.basis), boundary), state), nll

        steps = jnp.arange(setup.steps, dtype=jnp.int32)
        (rotation, _), losses = jax.lax.scan(step, (rotation, optimiser.init(rotation)), steps)
        return rotation.columns(), losses

    return jax.vmap(one_seed)(keys, labels)


@eqx.filter_jit
def predictions(
    model: SiteModel,
    triples: Triples,
    places: Int[Array, "place batch"],
    operands: Any,
    setup: Setup,
    make: MakeEdit = swap,
) -> Int[Array, "seed cell batch"]:
    """The answer to every triple under an edit in every cell; leaves of `operands` are `[seed cell …]`."""
    rows, columns = _cells(setup, places.shape[0])

    def of_chunk(chosen):
        batch = triples[chosen]
        values = source_values(model, batch, setup)

        def of_cell(cell):
            operand, row, column = cell
            pos = places[column][chosen]

            def of_seed(one):
                edit = _edit(setup, make, one, values, row, pos)
                return jnp.argmax(output_logits(model, batch, edit), -1).astype(jnp.int32)

            return jax.vmap(of_seed)(operand)

        by_cell = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), operands)
        return jax.lax.map(of_cell, (by_cell, rows, columns), batch_size=setup.cells_at_once)

    answers = jax.lax.map(of_chunk, _chunks(len(triples), setup.batch_size))
    return jnp.transpose(answers, (2, 1, 0, 3)).reshape(answers.shape[2], rows.shape[0], -1)[:, :, : len(triples)]


@eqx.filter_jit
def unedited(model: SiteModel, triples: Triples, batch_size: int) -> Float[Array, ""]:
    """The share of triples whose label the plain run on the base already gives."""

    def of_chunk(chosen):
        batch = triples[chosen]
        return jnp.argmax(output_logits(model, batch), -1) == batch.label

    correct = jax.lax.map(of_chunk, _chunks(len(triples), batch_size))
    return correct.reshape(-1)[: len(triples)].mean()


def _chunks(n: int, batch_size: int) -> Int[Array, "chunk row"]:
    """Rows in chunks of the training's size, which bounds the memory; the last one is filled up from the start."""
    n_chunks = -(-n // batch_size)
    return (jnp.arange(n_chunks * batch_size, dtype=jnp.int32) % n).reshape(n_chunks, -1)
