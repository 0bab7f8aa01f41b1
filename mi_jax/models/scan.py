"""The layers of a decoder, one after the other under one scan, with edits and captures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.apply import Taps
from mi_jax.core.taps import Slots, Tap, stacked_rows
from mi_jax.models.block import block
from mi_jax.models.layered import Layered
from mi_jax.models.layout import Layout, Prompts

# from a layer's number and the state to the layout of that layer, and to the state after it
Enter = Callable[[Int[Array, ""], Any], Layout]
Leave = Callable[[Any], Any]


def scan_layers(
    model: Layered,
    x: Float[Array, "batch pos d_model"],
    mask: Bool[Array, "batch pos"],
    taps: Taps,
    slots: Slots,
    n_layers: int,
    *,
    enter: Enter | None = None,
    leave: Leave | None = None,
    state: Any = None,
) -> tuple[Float[Array, "batch pos d_model"], dict[str, Array], Any]:
    """The stream after the first `n_layers` layers, what was captured in them, and the state.

    Args:
      mask: the real tokens of the stream.
      enter, leave: make the layout of a layer from the state, and the state of the layout after the layer; without
        them, all layers see whole prompts.
    """
    if n_layers == 0:
        return x, {}, state
    table, config = model.site_table, model.config

    def layer_step(x, state, number, params, rows):
        tap = Tap(table, taps, slots.layered, rows, number, mask)
        layout = Prompts(mask) if enter is None else enter(number, state)
        x = block(model.layer(number, params), x, tap, config, layout)
        return x, state if leave is None else leave(layout), tap.seen

    numbers = jnp.arange(config.n_layers, dtype=jnp.int32)
    xs = jax.tree.map(lambda a: a[:n_layers], (numbers, model.blocks, stacked_rows(taps, table)))
    shapes = {}
    if slots.partial:
        first = jax.tree.map(lambda a: a[0], xs)
        shapes = jax.eval_shape(layer_step, x, state, *first)[2]

    def body(carry, row):
        x, state, buffers = carry
        x, state, seen = layer_step(x, state, *row)
        buffers, stacked = slots.write(buffers, seen, row[0])
        return (x, state, buffers), stacked

    (x, state, buffers), stacked = jax.lax.scan(body, (x, state, slots.empty(shapes)), xs)
    return x, slots.read(buffers, stacked), state
