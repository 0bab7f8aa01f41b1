"""What training steps of dictionaries are timed on: random activations and architectures of one shape; their memory."""

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, PRNGKeyArray

from mi_jax.decomposition import DictionaryConfig, Objective, TrainConfig, TrainState, architecture, init, train_step
from mi_jax.decomposition.objective import Coefficients, loss
from mi_jax.decomposition.training import InMemory, default_knobs, init_state, train_steps
from mi_jax.decomposition.training.state import trainable


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths, codes per token and tokens per step."""

    d_in: int
    d_sae: int
    k: int
    batch: int

    @property
    def dense_bytes(self) -> int:
        """Of dense codes of a batch in float32."""
        return 4 * self.batch * self.d_sae


FULL = Shape(d_in=768, d_sae=12288, k=32, batch=4096)
# eight dictionaries, their moments and their gradients fit into memory
EACH_OF_MANY = Shape(d_in=512, d_sae=4096, k=32, batch=1024)
# more tokens than widths, and more latents than an auxiliary loss reads: only dense codes have tokens × latents numbers
SMOKE = Shape(d_in=8, d_sae=512, k=2, batch=96)

OURS = TrainConfig(steps=10_000, learning_rate=3e-4, warmup_steps=0, dead_after=1000 * FULL.batch)
# the step of SAELens' trainer: no constraint on the decoder, gradients clipped, its decay rates
AS_SAE_LENS = dataclasses.replace(OURS, decoder="free", clip=1.0, b2=0.999)
BATCHES = 2


def activations(shape: Shape, n: int, *, key: PRNGKeyArray) -> Float[Array, "n batch d_in"]:
    """Batches of independent normal activations."""
    return jax.random.normal(key, (n, shape.batch, shape.d_in))


def configured(name: str, shape: Shape) -> tuple[DictionaryConfig, Objective]:
    """An architecture of a shape, with k codes per token when it starts."""
    if name == "jumprelu":
        # pre-activations of normal activations with encoder rows of unit norm are normal
        threshold = statistics.NormalDist().inv_cdf(1 - shape.k / shape.d_sae)
        return architecture(name, shape.d_in, shape.d_sae, max_active=2 * shape.k, threshold=threshold)
    return architecture(name, shape.d_in, shape.d_sae, k=shape.k)


class Training:
    """Steps of one architecture on some batches in turn.

    Attributes:
      state: after the last step.
      metrics: of the last step.
    """

    state: TrainState
    metrics: Mapping[str, Array]

    def __init__(
        self,
        name: str,
        shape: Shape,
        batches: Float[Array, "n batch d_in"],
        *,
        key: PRNGKeyArray,
        train: TrainConfig = OURS,
        all_dead: bool = False,
    ):
        """Starts a training.

        Args:
          name: of the architecture.
          shape: its shape.
          batches: step t is on batch t modulo their number.
          key: draws the dictionary.
          train: the schedule.
          all_dead: every latent counts as dead at every step, so that the auxiliary loss is computed.
        """
        self.config, self.objective = configured(name, shape)
        self.shape, self.train, self.all_dead = shape, dataclasses.replace(train, batch_size=shape.batch), all_dead
        self.batches = [jnp.copy(batch) for batch in batches]
        self.taken = 0
        self.state = init_state(init(self.config, key=key), self.config, self.objective, self.train)

    def step(self) -> TrainState:
        """One step more."""
        x = self.batches[self.taken % len(self.batches)]
        self.taken += 1
        if self.all_dead:
            dead = jnp.full(self.shape.d_sae, self.train.dead_after, jnp.int32)
            self.state = eqx.tree_at(lambda s: s.since_fired, self.state, dead)
        self.state, self.metrics = train_step(self.state, x, objective=self.objective, train=self.train)
        return self.state

    def save(self, path: Path) -> None:
        """Writes the batches and the weights for the other programs."""
        names = ("w_enc", "w_dec", "b_enc", "b_dec")
        weights = {name: np.asarray(getattr(self.state.dictionary, name)) for name in names}
        safetensors.numpy.save_file(weights | {"batches": np.stack([np.asarray(x) for x in self.batches])}, path)

    def temporary_bytes(self) -> int | None:
        """What the compiled step needs beside its arguments and its results, if the compiler says so."""
        lowered = train_step.lower(self.state, self.batches[0], objective=self.objective, train=self.train)
        memory = lowered.compile().memory_analysis()
        return None if memory is None else memory.temp_size_in_bytes

    def dense_arrays_kept(self) -> int:
        """How many arrays as large as dense codes of a batch the forward pass keeps for the backward pass."""
        dictionary, x = self.state.dictionary, self.batches[0]
        params, fixed = eqx.partition(dictionary, trainable(dictionary))
        dead = jnp.zeros(self.shape.d_sae, bool)
        coefficients = Coefficients(sparsity=jnp.float32(1.0), p=jnp.float32(1.0))

        def kept(params, x, chosen):
            def of(params):
                return loss(eqx.combine(params, fixed), x, x, dead, self.objective, coefficients, chosen)

            return jax.tree.leaves(jax.vjp(of, params, has_aux=True)[1])

        arrays = jax.eval_shape(kept, params, x, jax.eval_shape(dictionary.choose, x))
        return sum(array.size >= self.shape.batch * self.shape.d_sae for array in arrays)


class Trainings:
    """Trainings of dictionaries in one program, as `fit_many` has them; a call is `STEPS` steps of each."""

    STEPS = 10

    def __init__(self, n: int, shape: Shape, *, key: PRNGKeyArray, together: bool = False):
        """Starts them.

        Args:
          n: how many.
          shape: of each.
          key: draws activations and dictionaries.
          together: side by side instead of one after the other.
        """
        config, self.objective = configured("topk", shape)
        self.train, self.together = dataclasses.replace(OURS, batch_size=shape.batch), together
        x = activations(shape, BATCHES, key=jax.random.fold_in(key, 0)).reshape(-1, shape.d_in)
        one = jnp.float32(1.0)
        self.source = InMemory(x, None, jnp.arange(x.shape[0]), one, one, shape.batch)
        states = tuple(
            init_state(init(config, key=jax.random.fold_in(key, 1 + i)), config, self.objective, self.train)
            for i in range(n)
        )
        knobs = (default_knobs(config, self.objective, self.train),) * n
        self.state, self.knobs = (
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if together else trees for trees in (states, knobs)
        )

    def call(self) -> dict[str, Array]:
        """Some steps more; returns their metrics."""
        how = {"knobs": self.knobs, "objective": self.objective, "train": self.train, "together": self.together}
        self.state, metrics = train_steps(self.state, self.source, jnp.int32(self.STEPS), **how)
        return metrics
