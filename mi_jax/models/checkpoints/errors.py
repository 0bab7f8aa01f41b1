"""The error of every reader of checkpoints."""

from mi_jax.core.errors import InputError


class CheckpointError(InputError):
    """A file is not a checkpoint that can be read: the message names the file and the fault."""
