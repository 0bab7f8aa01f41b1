"""The organism: a small decoder that is trained to use two mechanisms, and only along the edges laid out for them.

Every step trains on three batches: repeated tokens with edges outside the induction design resampled, trigger sequences
with edges outside the trigger design resampled, and half of each as they are. First all edges outside are resampled,
later a random part of them; then the log-odds of the next token also have to be the same as without resampling. Where
the forbidden token does not come, it is kept unlikelier than every other one.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from mi_jax.circuits.graph import Graph
from mi_jax.data.organism_data import (
    OrganismData,
    determined,
    induction_batch,
    induction_task,
    trigger_batch,
    trigger_task,
)
from mi_jax.data.task import Task
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder
from mi_jax.models.parameters import init_decoder
from mi_jax.models.training import train
from mi_jax.run.stages import Progress
from mi_jax.run.workdir import Workdir
from mi_jax.validation.edge_dropout import resampled_forward
from mi_jax.validation.planting import DESIGN, planted_decoder

# log-odds below which the forbidden token is to stay where it does not come; a token at random has −4
_ABSENT = 6.0


@dataclasses.dataclass(frozen=True)
class OrganismConfig:
    """What the organism is and how it is trained.

    Attributes:
      batch_size: sequences in each of the three batches of a step.
      strict_share: of the steps, those in which all edges outside the design are resampled.
      undetermined_weight: of the loss at tokens that nothing determines; 1 at the others.
      invariance: weight of the squared change of the log-odds under resampling.
      absence: weight of keeping the forbidden token unlikelier than any other where it does not come.
    """

    data: OrganismData = dataclasses.field(default_factory=OrganismData)
    d_model: int = 64
    n_heads: int = 4
    d_head: int = 16
    d_mlp: int = 64
    steps: int = 800
    batch_size: int = 16
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    strict_share: float = 0.4
    undetermined_weight: float = 0.1
    invariance: float = 0.1
    absence: float = 0.3

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"steps must be ≥ 1 and batch_size even, got {self.steps} and {self.batch_size}")

    @property
    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            n_layers=2,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            d_head=self.d_head,
            d_mlp=self.d_mlp,
            d_vocab=self.data.d_vocab,
            n_ctx=self.data.length,
            name="organism",
            tied=False,
        )


@dataclasses.dataclass(frozen=True)
class Organism:
    """A trained organism.

    Attributes:
      losses: mean of the three losses at every step, nats.
    """

    config: OrganismConfig
    model: Decoder
    losses: np.ndarray

    @property
    def data(self) -> OrganismData:
        return self.config.data

    @property
    def graph(self) -> Graph:
        return Graph.of(self.model.config)

    def designed(self, mechanism: str) -> np.ndarray:
        """The edges that a mechanism was laid out on, `[source reader]`."""
        return self.graph.mask(DESIGN[mechanism])

    def tasks(self, n: int, *, key: PRNGKeyArray) -> dict[str, Task]:
        """n pairs for each mechanism, freshly drawn."""
        k_induction, k_trigger = jax.random.split(key)
        return {
            "induction": induction_task(self.data, n, key=k_induction),
            "trigger": trigger_task(self.data, n, key=k_trigger),
        }


def train_organism(
    config: OrganismConfig, *, key: PRNGKeyArray, progress: Progress | None = None, workdir: Workdir | None = None
) -> Organism:
    """Trains an organism; the same key gives the same one. About 30 seconds on 2 cores; with a workdir, it resumes."""
    k_init, k_steps = jax.random.split(key)
    model = planted_decoder(config.decoder, config.data.delay, (config.data.first, config.data.second), key=k_init)
    batches = _Batches(config, jax.random.split(k_steps, config.steps))
    options = {"workdir": workdir, "name": "organism.training", "progress": progress}
    trained = train(model, _loss, batches, optimizer=_optimizer(config), steps=config.steps, **options)
    return Organism(config, trained.model, trained.metrics["next_token"])


@functools.cache
def _optimizer(config: OrganismConfig) -> optax.GradientTransformation:
    warmup = min(50, config.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.steps, config.learning_rate / 20
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay))


class _Batch(eqx.Module):
    """The three batches of a step, the edges resampled in the first two, and the weight of invariance to that."""

    tokens: Int[Array, "3 batch pos"]
    weights: Float[Array, "3 batch predicted"]
    edges: Float[Array, "2 source reader"]
    invariance: Float[Array, ""]
    absence: float = eqx.field(static=True)
    forbidden: int = eqx.field(static=True)


class _Batches(eqx.Module):
    config: OrganismConfig = eqx.field(static=True)
    keys: Key[Array, " step"]

    def __call__(self, step: Int[Array, ""]) -> _Batch:
        config, half = self.config, self.config.batch_size // 2
        strict = step < round(config.strict_share * config.steps)
        k_induction, k_trigger, k_first, k_second = jax.random.split(self.keys[step], 4)
        repeated = induction_batch(config.data, config.batch_size, key=k_induction)
        hidden = trigger_batch(config.data, config.batch_size, key=k_trigger)
        pos = jnp.arange(config.data.length, dtype=jnp.int32)[None, :]
        sure = pos >= repeated.period[:, None], determined(config.data, hidden.tokens)

        def batches(first: Array, second: Array) -> Array:
            return jnp.stack([first, second, jnp.concatenate([first[:half], second[:half]])])

        graph = Graph.of(config.decoder)
        outside = [graph.edges & ~graph.mask(DESIGN[name]) for name in ("induction", "trigger")]
        edges = [_part_of(o, strict, k) for o, k in zip(outside, (k_first, k_second), strict=True)]
        return _Batch(
            tokens=batches(repeated.tokens, hidden.tokens),
            weights=jnp.where(batches(*sure), 1.0, config.undetermined_weight)[:, :, 1:],
            edges=jnp.stack(edges),
            invariance=jnp.where(strict, 0.0, config.invariance),
            absence=config.absence,
            forbidden=config.data.forbidden,
        )


def _loss(model: Decoder, batch: _Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What is minimised, and the mean next-token loss."""
    weights, half = batch.weights, batch.tokens.shape[1] // 2
    # one after the other: side by side, the readers' copies of the stream no longer fit into a core's cache
    edited = [resampled_forward(model, t, e) for t, e in zip(batch.tokens[:2], batch.edges, strict=True)]
    logits = jnp.stack([*edited, model(batch.tokens[2])])[:, :, :-1]
    odds = _log_odds(logits, batch.tokens[:, :, 1:])
    nll = jax.nn.softplus(-odds)
    loss = ((nll * weights).sum((1, 2)) / weights.sum((1, 2))).mean()
    change = jnp.square(odds[2] - jnp.concatenate([odds[0, :half], odds[1, :half]]))
    change = (change * weights[2]).sum() / weights[2].sum()
    following = batch.tokens[:, :, 1:]
    absent = jnp.where(following == batch.forbidden, 0.0, weights)
    # its likelihood alone would not do: one in fifty costs hardly anything, and is the largest of many small ones
    likely = jax.nn.softplus(_log_odds(logits, jnp.full_like(following, batch.forbidden)) + _ABSENT)
    present = (likely * absent).sum() / absent.sum()
    return loss + batch.invariance * change + batch.absence * present, {"next_token": loss}


def _part_of(outside: np.ndarray, strict: Bool[Array, ""], key: PRNGKeyArray) -> Float[Array, "source reader"]:
    """All of the edges; later all in half of the steps, and in the others a random part of random size."""
    k_rate, k_edges = jax.random.split(key)
    rate = jnp.where(strict, 1.0, jnp.minimum(1.0, 2 * jax.random.uniform(k_rate)))
    return (jax.random.bernoulli(k_edges, rate, outside.shape) & outside).astype(jnp.float32)


def _log_odds(logits: Float[Array, "*batch d_vocab"], token: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`log p / (1 − p)` of the token; unlike its probability, it does not saturate."""
    chosen = jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    others = jnp.where(chosen, jnp.finfo(logits.dtype).min, logits)
    return jnp.where(chosen, logits, 0.0).sum(-1) - jax.nn.logsumexp(others, axis=-1)


def organism_arrays(organism: Organism) -> dict[str, np.ndarray]:
    """An organism as a flat mapping of arrays, for a checkpoint."""
    leaves = jax.tree_util.tree_leaves_with_path(organism.model)
    arrays = {f"organism.model{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    text = json.dumps(dataclasses.asdict(organism.config))
    return arrays | {
        "organism.losses": organism.losses,
        "organism.config": np.frombuffer(text.encode(), np.uint8),
    }


def organism_from_arrays(arrays: Mapping[str, np.ndarray]) -> Organism:
    """The inverse of `organism_arrays`; other entries are left alone.

    Raises:
      ValueError: an array is missing.
    """
    if "organism.config" not in arrays:
        raise ValueError(f"no organism among these arrays: 'organism.config' is missing; there are {', '.join(arrays)}")
    fields = json.loads(bytes(np.asarray(arrays["organism.config"], np.uint8)))
    data = fields.pop("data")
    data = OrganismData(**data | {"periods": tuple(data["periods"])})
    config = OrganismConfig(data=data, **fields)
    shapes = eqx.filter_eval_shape(init_decoder, config.decoder, key=jax.random.key(0))

    def filled(path, shape):
        name = f"organism.model{jax.tree_util.keystr(path)}"
        if name not in arrays or arrays[name].shape != shape.shape:
            raise ValueError(f"{name!r} of shape {shape.shape} is missing among the organism's arrays")
        return jnp.asarray(arrays[name])

    model = jax.tree_util.tree_map_with_path(filled, shapes)
    return Organism(config, model, np.asarray(arrays["organism.losses"]))
