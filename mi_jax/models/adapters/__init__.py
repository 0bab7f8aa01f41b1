"""Adapters for models that this project did not write: Flax Linen, Flax NNX, Equinox.

Flax is imported when an adapter for it is asked for, and need not be there otherwise.
"""

from typing import TYPE_CHECKING, Any

from mi_jax.models.adapters.equinox import adapt_equinox as adapt_equinox

if TYPE_CHECKING:
    from mi_jax.models.adapters.linen import adapt_linen as adapt_linen
    from mi_jax.models.adapters.nnx import adapt_nnx as adapt_nnx


def __getattr__(name: str) -> Any:
    if name == "adapt_linen":
        from mi_jax.models.adapters.linen import adapt_linen

        return adapt_linen
    if name == "adapt_nnx":
        from mi_jax.models.adapters.nnx import adapt_nnx

        return adapt_nnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
