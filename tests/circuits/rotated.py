"""A model with a known causal variable: which subspace carries it, where, and from which layer on."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.circuits.das import Triples
from mi_jax.core.sites import Site, SiteTable
from mi_jax.core.taps import Slots, Tap

D_MODEL, SCALE = 24, 1.0
_CODES = jnp.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], jnp.float32)


class Rotated(eqx.Module):
    """Two inputs `a` (position 0) and `c` (position 1), each 0–3, at ±1 along two directions of a random rotation.

    Layer 0 leaves the stream as it is. Layer 1 moves `a` from position 0 to position 1, other directions than `c`'s,
    where the answer 4a + c is read. So `a` is at position 0 after layer 0 and at position 1 after layer 1, and nowhere
    else. The other directions hold what differs between the prompts and means nothing.
    """

    rotation: Float[Array, "d_model d_model"]
    noise: Float[Array, "prompt d_model"]

    @property
    def site_table(self) -> SiteTable:
        stream = Site("resid_post", ("layer", "batch", "pos", "d_model"))
        pooled = Site("pooled", ("batch", "d_model"))
        heads = Site("heads", ("layer", "batch", "pos", "head", "d_head"))
        return SiteTable("rotated", (stream, pooled, heads), (("layer", 2), ("d_model", D_MODEL)))

    @property
    def a(self) -> Float[Array, "d_model 2"]:
        """The subspace of `a`, at both positions."""
        return self.rotation[:, :2]

    def __call__(self, tokens, mask=None, *, taps=None, capture=None, output=True):
        table = self.site_table
        slots = Slots(table.normalise(capture or ()), table)
        values, noise = tokens % 4, self.noise[tokens // 4]
        a, c = (_CODES[values[:, i]] @ self.rotation[:, 2 * i : 2 * i + 2].T for i in (0, 1))
        x = jnp.stack([a, c], 1) + noise @ self.rotation[:, 4:] @ self.rotation[:, 4:].T
        seen = []
        for layer in range(2):
            tap = Tap(table, taps or {}, slots.layered, {}, jnp.asarray(layer, jnp.int32))
            if layer == 1:
                moved = x[:, 0] @ self.a @ self.a.T
                x = x.at[:, 0].add(-moved).at[:, 1].add(moved)
            x = tap("resid_post", x)
            seen.append(tap.seen)
        outer = Tap(table, taps or {}, slots.single, {}, None)
        last = outer("pooled", x[:, 1])
        bits = last @ self.rotation[:, :4]
        logits = SCALE * (bits[:, :2] @ _CODES.T)[:, :, None] + SCALE * (bits[:, 2:] @ _CODES.T)[:, None, :]
        logits = logits.reshape(-1, 16)
        if capture is None:
            return logits
        buffers, stacked = slots.empty(seen[0]), []
        for layer, one in enumerate(seen):
            buffers, rest = slots.write(buffers, one, jnp.asarray(layer, jnp.int32))
            stacked.append(rest)
        acts = slots.read(buffers, jax.tree.map(lambda *xs: jnp.stack(xs), *stacked))
        return logits, acts | outer.seen


def rotated() -> Rotated:
    k_rotation, k_noise = jax.random.split(jax.random.key(0))
    rotation = jnp.linalg.qr(jax.random.normal(k_rotation, (D_MODEL, D_MODEL)))[0]
    return Rotated(rotation, jax.random.normal(k_noise, (8, D_MODEL)))


def triples(seed: int, n: int = 256, prompts: tuple[int, int] = (0, 4)) -> Triples:
    """The answer with the source's `a` and the base's `c`; `prompts` limits the meaningless part of the inputs."""
    k_value, k_prompt = jax.random.split(jax.random.key(seed))
    values = jax.random.randint(k_value, (2, n, 2), 0, 4, jnp.int32)
    base, source = values + 4 * jax.random.randint(k_prompt, (2, n, 2), *prompts, jnp.int32)
    return Triples(base, source, 4 * values[1, :, 0] + values[0, :, 1])
