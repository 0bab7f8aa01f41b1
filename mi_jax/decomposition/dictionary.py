"""Sparse dictionaries: encode, sparsify, decode, over one site or several.

One module is a sparse autoencoder (it reconstructs what it reads), a transcoder (it predicts another site), a skip
transcoder (with a linear path beside the codes) or a crosscoder (its input and output are several sites, flattened).
"""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import Activation, BatchTopK, Chosen, JumpReLU, TopK
from mi_jax.decomposition.codes import Placed, decode
from mi_jax.decomposition.token_norm import TokenNorm

Tree = TypeVar("Tree")
PER_LATENT = ("w_enc", "b_enc", "w_dec", "r_mag", "b_mag", "threshold", "since_fired")


class Dictionary(eqx.Module):
    """ŷ = z @ w_dec + b_dec (+ x @ w_skip), z = activation((x − b_dec) @ w_encᵀ + b_enc).

    Calling it gives the reconstruction, so it is a value for `mi.transform`. Both weight matrices hold one row per
    latent; the rows of `w_dec` are the features' directions.

    Attributes:
      w_enc: None where encoder and decoder are one matrix.
      b_enc: added to pre-activations.
      w_dec: directions of the latents.
      b_dec: added to the reconstruction, and, with `centred`, taken off the input.
      activation: how pre-activations become codes.
      w_skip: the linear path of a skip transcoder.
      token_norm: normalisation of every token, undone on the reconstruction.
      centred: whether the encoder reads x − b_dec; without, it reads x.
      n_sites: a crosscoder reads and writes this many sites of equal width, [site, d_model] flattened.
    """

    w_enc: Float[Array, "d_sae d_in"] | None
    b_enc: Float[Array, " d_sae"]
    w_dec: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    activation: Activation
    w_skip: Float[Array, "d_in d_out"] | None = None
    token_norm: TokenNorm | None = None
    centred: bool = eqx.field(static=True, default=True)
    n_sites: int = eqx.field(static=True, default=1)

    @property
    def encoder(self) -> Float[Array, "d_sae d_in"]:
        """The encoder's rows; the decoder's where both are one."""
        return self.w_dec if self.w_enc is None else self.w_enc

    @property
    def centre(self) -> Float[Array, " d_in"]:
        """What is taken off an activation before it is encoded."""
        return self.b_dec if self.centred else jnp.zeros(self.d_in, self.b_dec.dtype)

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.w_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.w_dec.shape[0]

    @property
    def k(self) -> int | None:
        """Codes per token, for activations that count them."""
        return getattr(self.activation, "k", None)

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes."""
        rows, _ = self._rows(x)
        return self.activation.encode(rows - self.centre[None, :], self.encoder, self.b_enc).reshape(
            *x.shape[:-1], self.d_sae
        )

    def encode_sparse(self, x: Float[Array, "*batch d_in"]) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
        """Values and latents of the k codes of every token, largest first.

        Raises:
          InputError: the activation does not keep a fixed number of codes per token.
        """
        if not isinstance(self.activation, TopK):
            raise InputError(
                f"{type(self.activation).__name__} has no fixed number of codes per token; use `encode`, or "
                "`jax.lax.top_k` of it"
            )
        rows, _ = self._rows(x)
        chosen = self.choose(rows)
        assert chosen is not None
        values = self.activation.value(chosen.h, lambda p: p, self.b_enc)
        return values.reshape(*x.shape[:-1], -1), chosen.where.latents.reshape(*x.shape[:-1], -1)

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_out"]:
        """Reconstruction from dense codes, whatever their sparsity, without skip and token norm; see `reconstruct`."""
        return codes @ self.w_dec + jnp.broadcast_to(self.b_dec, (*codes.shape[:-1], self.d_out))

    def reconstruct(
        self, x: Float[Array, "*batch d_in"], codes: Float[Array, "*batch d_sae"]
    ) -> Float[Array, "*batch d_out"]:
        """What the dictionary would make of activations if they had these codes, with skip and token norm.

        `reconstruct(x, encode(x))` is the dictionary's own call.
        """
        rows, undo = self._rows(x)
        out = self.decode(codes.reshape(-1, self.d_sae))
        if self.w_skip is not None:
            out = out + rows @ self.w_skip
        return undo(out).reshape(*x.shape[:-1], self.d_out)

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        rows, undo = self._rows(x)
        if isinstance(self.activation, TopK):
            chosen = self.choose(rows)
            assert chosen is not None
            values, _ = self.activation.codes(chosen, rows, self.centre, self.encoder, self.b_enc)
            out = decode(values, chosen.where, self.w_dec) + self.b_dec[None, :]
        else:
            out = self.decode(self.activation.encode(rows - self.centre[None, :], self.encoder, self.b_enc))
        if self.w_skip is not None:
            out = out + rows @ self.w_skip
        return undo(out).reshape(*x.shape[:-1], self.d_out)

    def choose(self, rows: Float[Array, "token d_in"], valid: Bool[Array, " token"] | None = None) -> Chosen | None:
        """Where a training batch has codes, without gradient; None where codes are dense.

        `valid` says which rows have weight, for activations that choose over the batch; None for all.
        """
        return self.activation.choose(rows - self.centre[None, :], self.encoder, self.b_enc, valid)

    def decoder_norms(self) -> Float[Array, " d_sae"]:
        """‖w_dec[j]‖, summed over the sites of a crosscoder: the weight of a latent's code in a sparsity penalty."""
        return jnp.sqrt((self.w_dec.reshape(self.d_sae, self.n_sites, -1) ** 2).sum(-1)).sum(-1)

    def _rows(self, x: Array):
        if x.shape[-1] != self.d_in:
            raise InputError(f"the dictionary reads activations of width {self.d_in}, got shape {x.shape}")
        rows = x.reshape(-1, self.d_in)
        if self.token_norm is None:
            return rows, lambda out: out
        return self.token_norm(rows)


def placed(dictionary: Dictionary, values: Array, latents: Array) -> Float[Array, "token d_out"]:
    """Reconstruction from k codes per token."""
    return decode(values, Placed(latents), dictionary.w_dec) + dictionary.b_dec[None, :]


def logical_axes(tree: Tree) -> Tree:
    """The same tree with the names of each array's axes, for `mi_jax.core.sharding.shard`.

    `tree` is a dictionary, or what holds one and its like, such as a training's state; of arrays, or of their shapes.
    """

    def names(path, leaf):
        if of_latents(path) and leaf.ndim:
            return ("d_sae", *(("d_model",) if leaf.ndim == 2 else ()))
        return (None,) * leaf.ndim

    return jax.tree_util.tree_map_with_path(names, tree)


def of_latents(path: tuple) -> bool:
    """Whether the leaf at this path of a tree has a row or a number per latent."""
    return any(getattr(key, "name", None) in PER_LATENT for key in path)


def fold_scale(dictionary: Dictionary, scale_in: Array | float, scale_out: Array | float | None = None) -> Dictionary:
    """The dictionary of x → y that does what this one does from x · scale_in to y · scale_out.

    Codes come out in the units of x; reconstructions are equal up to rounding. Thresholds and biases are divided, and
    a transcoder's decoder takes the ratio of the two scales.
    """
    scale_out = scale_in if scale_out is None else scale_out
    ratio = scale_in / scale_out
    if dictionary.centred and scale_out is not scale_in:
        raise InputError("a dictionary that takes b_dec off its input has one scale for input and output")
    return eqx.tree_at(
        lambda d: (d.b_enc, d.w_dec, d.b_dec, d.activation, d.w_skip),
        dictionary,
        (
            dictionary.b_enc / scale_in,
            dictionary.w_dec if scale_out is scale_in else dictionary.w_dec * ratio,
            dictionary.b_dec / scale_out,
            dictionary.activation.scaled(1 / scale_in),
            None if dictionary.w_skip is None else dictionary.w_skip * ratio,
        ),
        is_leaf=lambda leaf: leaf is None,
    )


def fold_decoder_norms(dictionary: Dictionary) -> Dictionary:
    """The same function with decoder rows of unit norm: codes, encoder rows and thresholds take the norms.

    TopK then chooses by h · ‖w_dec‖ instead of h, which is another function unless norms are equal; BatchTopK becomes
    the JumpReLU that it is outside training, with a threshold per latent.
    """
    norms = jnp.maximum(jnp.linalg.norm(dictionary.w_dec, axis=1), 1e-30)
    activation = dictionary.activation
    if isinstance(activation, BatchTopK):
        activation = JumpReLU(jnp.broadcast_to(activation.threshold.astype(jnp.float32), norms.shape))
    return eqx.tree_at(
        lambda d: (d.w_enc, d.b_enc, d.w_dec, d.activation),
        dictionary,
        (
            dictionary.encoder * norms[:, None],
            dictionary.b_enc * norms,
            dictionary.w_dec / norms[:, None],
            activation.scaled(norms),
        ),
        is_leaf=lambda leaf: leaf is None,
    )
