"""Training dictionaries: the compiled step, its schedule, and whole trainings, one or many at once."""

from mi_jax.decomposition.training.checkpoints import Checkpoints as Checkpoints
from mi_jax.decomposition.training.config import Knobs as Knobs
from mi_jax.decomposition.training.config import TrainConfig as TrainConfig
from mi_jax.decomposition.training.fit import fit as fit
from mi_jax.decomposition.training.fit import fit_many as fit_many
from mi_jax.decomposition.training.fit import train_steps as train_steps
from mi_jax.decomposition.training.source import InMemory as InMemory
from mi_jax.decomposition.training.source import Source as Source
from mi_jax.decomposition.training.state import TrainState as TrainState
from mi_jax.decomposition.training.state import default_knobs as default_knobs
from mi_jax.decomposition.training.state import init_state as init_state
from mi_jax.decomposition.training.step import METRICS as METRICS
from mi_jax.decomposition.training.step import train_step as train_step
from mi_jax.decomposition.training.streaming import Training as Training
from mi_jax.decomposition.training.streaming import fit_stream as fit_stream
