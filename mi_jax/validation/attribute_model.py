"""A two-layer transformer whose stream carries known features: attributes of the current token and of the last.

It is trained on `AttributeTask`. Every layer sees two tokens, so that the stream after the first layer has to carry the
attributes of both. That it does is measured, not assumed: see `attribute_truth`.
"""

import dataclasses
import functools

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.core.sites import at
from mi_jax.core.transforms import capture, jit
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder
from mi_jax.models.parameters import init_decoder
from mi_jax.models.training import next_token_loss, train
from mi_jax.run.stages import Progress
from mi_jax.run.workdir import Workdir
from mi_jax.validation.attribute_task import AttributeTask, AttributeTaskConfig, attribute_task

# the stream between the layers, and the first position from which on every attribute that the rule reads exists
SITE, LAYER, FIRST = "resid_post", 0, 2


@dataclasses.dataclass(frozen=True)
class AttributeModelConfig:
    """The task, the transformer and its training."""

    task: AttributeTaskConfig = dataclasses.field(default_factory=AttributeTaskConfig)
    d_model: int = 64
    n_heads: int = 4
    d_mlp: int = 128
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 0.3

    def __post_init__(self):
        if self.n_heads < 1 or self.d_model % (2 * self.n_heads) or self.batch_size < 1 or self.d_mlp < 1:
            raise InputError(
                "d_model is a multiple of twice n_heads, as rotary heads need, and batch_size and d_mlp are at least "
                f"1; got d_model={self.d_model}, n_heads={self.n_heads}, batch_size={self.batch_size} and "
                f"d_mlp={self.d_mlp}"
            )

    @property
    def decoder(self) -> DecoderConfig:
        """Two layers, in which every position sees itself and the one before."""
        return DecoderConfig(
            n_layers=2,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            d_head=self.d_model // self.n_heads,
            d_mlp=self.d_mlp,
            d_vocab=self.task.n_tokens,
            n_ctx=self.task.n_pos,
            windows=(2, 2),
            tied=False,
            name="attributes",
        )


@dataclasses.dataclass(frozen=True)
class AttributeModel:
    """A task and the model that was trained on it.

    Attributes:
      losses: of every step, nats per token.
    """

    task: AttributeTask
    model: Decoder
    losses: Float[np.ndarray, " step"]

    def activations(
        self, tokens: Int[Array, "batch pos"]
    ) -> tuple[Float[Array, "batch kept d_model"], Float[Array, "batch kept feature"]]:
        """The stream between the layers, and the features that it should carry; the first two positions are left out.

        To these positions the rule gives no token two back.
        """
        read = jit(capture(self.model, at(SITE, layers=(LAYER,))))
        x = read(tokens, output=False)[1][SITE][0]
        return x[:, FIRST:], self.task.features(tokens)[:, FIRST:]


@dataclasses.dataclass(frozen=True)
class Learned:
    """How well a model predicts fresh sequences, nats per token.

    Attributes:
      best: the entropy of the rule.
      unigram: of the tokens' frequencies.
      share: of what the rule gives over the frequencies, what the model has; 1 is perfect.
    """

    loss: float
    best: float
    unigram: float

    @property
    def share(self) -> float:
        return (self.unigram - self.loss) / (self.unigram - self.best)


def train_attribute_model(
    config: AttributeModelConfig,
    *,
    key: PRNGKeyArray,
    progress: Progress | None = None,
    workdir: Workdir | None = None,
) -> AttributeModel:
    """Trains the transformer; the same key gives the same one. About 45 seconds on 2 cores; with a workdir, it resumes.

    Raises:
      InputError: a task without a token for some attribute.
    """
    k_task, k_init, k_batches = jax.random.split(key, 3)
    task = attribute_task(config.task, key=k_task)
    batches = _Batches(task, config.batch_size, k_batches)
    options = {"workdir": workdir, "name": "attributes.training", "progress": progress}
    model = init_decoder(config.decoder, key=k_init)
    trained = train(model, _loss, batches, optimizer=_optimizer(config), steps=config.steps, **options)
    return AttributeModel(task, trained.model, trained.losses)


def learned(trained: AttributeModel, tokens: Int[Array, "batch pos"]) -> Learned:
    """The loss on sequences of the task, beside the best one and that of the tokens' frequencies."""
    following = np.asarray(tokens)[:, FIRST + 1 :]

    def loss(log_p: Array) -> float:
        chosen = np.take_along_axis(np.asarray(log_p)[:, FIRST:-1], following[:, :, None], axis=-1)
        return -float(chosen.mean())

    counts = np.bincount(np.asarray(tokens).ravel(), minlength=trained.task.config.n_tokens) + 1
    unigram = -np.log(counts / counts.sum())[following].mean()
    logits = jit(trained.model)(tokens)
    return Learned(loss(jax.nn.log_softmax(logits)), loss(trained.task.log_probabilities(tokens)), float(unigram))


class _Batches(eqx.Module):
    task: AttributeTask
    batch_size: int = eqx.field(static=True)
    key: PRNGKeyArray

    def __call__(self, step: Int[Array, ""]) -> Int[Array, "batch pos"]:
        return self.task.sequences(self.batch_size, key=jax.random.fold_in(self.key, step))


def _loss(model: Decoder, tokens: Int[Array, "batch pos"]) -> Float[Array, ""]:
    return next_token_loss(model(tokens), tokens)


@functools.cache
def _optimizer(config: AttributeModelConfig) -> optax.GradientTransformation:
    warmup = min(100, config.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.steps, config.learning_rate / 50
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay))
