"""What is evaluated: anything that encodes, decodes and reconstructs."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array


@runtime_checkable
class Reconstructor(Protocol):
    """A `Dictionary`, a `PCA`, or any pytree with these three calls; all of them take leading batch axes."""

    def encode(self, x: Array) -> Array: ...

    def decode(self, codes: Array) -> Array: ...

    def __call__(self, x: Array) -> Array: ...
