"""Training of organisms and toy models: one loop, sharded and resumable, around an optax optimizer."""

from mi_jax.models.training.batches import Sampled as Sampled
from mi_jax.models.training.loop import TrainingError as TrainingError
from mi_jax.models.training.loop import TrainResult as TrainResult
from mi_jax.models.training.loop import train as train
from mi_jax.models.training.losses import next_token_loss as next_token_loss
from mi_jax.models.training.state import TrainState as TrainState
from mi_jax.models.training.state import updated as updated
