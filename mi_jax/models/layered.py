"""What a scan over layers and the cells of a sweep need of a model; `Decoder` is one."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from mi_jax.core.sites import SiteTable
from mi_jax.core.taps import Tap
from mi_jax.models.block import Block, Layer
from mi_jax.models.config import DecoderConfig


@runtime_checkable
class Layered(Protocol):
    """A model of stacked layers between an embedding and a head."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def blocks(self) -> Block: ...

    @property
    def site_table(self) -> SiteTable: ...

    def layer(self, number: Int[Array, ""] | int, params: Block) -> Layer:
        """One layer, of `blocks` the row `number`."""
        ...

    def head(self, x: Float[Array, "batch pos d_model"], tap: Tap, output_pos: Array | None = None) -> Array:
        """From the stream after the last layer to the output."""
        ...

    def __call__(self, *inputs: Any, **options: Any) -> Any: ...
