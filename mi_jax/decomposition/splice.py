"""A dictionary inside a model: what `mi.transform` puts at a site, with or without what it does not explain."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from mi_jax.decomposition.dictionary import Dictionary


class Splice(eqx.Module):
    """Replaces activations by a dictionary's reconstruction from edited codes.

    With ŷ(x, z) the reconstruction of x from codes z, the value with the error term is `x + ŷ(x, edit(z)) − ŷ(x, z)`:
    an edit that changes no code changes nothing, and what an edit changes is what it says. Without it, it is
    `ŷ(x, edit(z))`, which is the dictionary's own call where the codes stay.

    Attributes:
      dictionary: anything with `encode` to codes `[… d_sae]` and `decode`, such as a `PCA`; of a `Dictionary`, its skip
        and its token norm take part.
      edit: a function of the codes; its arrays are traced. None leaves them as they are.
      error_term: Marks et al. 2024 (arXiv 2403.19647), section 3.1.

    Example:
      `mi.transform("resid_post", Splice(sae, lambda z: z.at[..., 7].set(0.0)), layer=8)` ablates latent 7.
    """

    dictionary: Any
    edit: Callable[[Array], Array] | None = None
    error_term: bool = eqx.field(static=True, default=True)

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        codes = self.dictionary.encode(x)
        new = self._reconstruct(x, codes if self.edit is None else self.edit(codes))
        return x + new - self._reconstruct(x, codes) if self.error_term else new

    def _reconstruct(self, x: Array, codes: Array) -> Array:
        if isinstance(self.dictionary, Dictionary):
            return self.dictionary.reconstruct(x, codes)
        return self.dictionary.decode(codes)
