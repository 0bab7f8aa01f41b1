"""The tuned lens: a logit lens with one trained affine translator per layer.

Later layers may write in another basis than earlier ones. A translator maps the stream of its layer into the basis of
the last one; it starts as the identity, where it is the logit lens, and is trained on KL(final ‖ lens).

Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", §3.
"""

import dataclasses
import os
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from etils import epath
from jaxtyping import Array, Bool, Float, Int, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mi_jax.core.errors import InputError
from mi_jax.core.sites import LAYER, SiteError, at
from mi_jax.core.transforms import SiteModel
from mi_jax.decomposition.evaluation import Estimate, bootstrap_ratio
from mi_jax.features.lens import Head, Lens, in_float32, kl, logit_lens, native_head, stream_site, unwrap
from mi_jax.models.training import updated
from mi_jax.run.files import write_bytes


class TunedLens(eqx.Module):
    """Translators x ↦ x + x·weight + bias, one per layer."""

    weight: Float[Array, "*layer d_model d_model"]
    bias: Float[Array, "*layer d_model"]
    site: str = eqx.field(static=True, default="resid_post")

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        y = in_float32(x)
        return (y + y @ self.weight + jnp.broadcast_to(self.bias, x.shape)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class TunedLensConfig:
    """Schedule of the training.

    Attributes:
      batch_size: contexts per step.
      tokens_per_step: of their tokens, drawn at random, how many are read; None for all. The logits of one step take
        `layers_at_once · tokens_per_step · d_vocab` numbers.
      layers_at_once: layers whose logits are held together; None for all.
      learning_rate: of Adam, falling linearly to zero; relative to the size of the stream in each layer.
      steps_per_call: steps per compiled call.
    """

    steps: int = 500
    batch_size: int = 8
    tokens_per_step: int | None = None
    layers_at_once: int | None = None
    learning_rate: float = 1e-3
    steps_per_call: int = 50

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value}")


def identity_lens(model: SiteModel, *, site: str = "resid_post") -> TunedLens:
    """Translators that change nothing: the logit lens, and where training starts."""
    table = model.site_table
    n, d = table.size(LAYER), table.size("d_model")
    return TunedLens(jnp.zeros((n, d, d)), jnp.zeros((n, d)), stream_site(model, site))


def tuned_lens(model: SiteModel, lens: TunedLens, *, head: Head | None = None, layers=None) -> Lens:
    """What the model would predict after each layer, read through the translators; see `logit_lens`.

    Raises:
      SiteError: translators of another model.
    """
    shape, found = identity_lens(model, site=lens.site).weight.shape, lens.weight.shape
    if shape != found:
        raise SiteError(
            f"{model.site_table.model} has {shape[0]} layers of width {shape[1]}; these translators are for "
            f"{found[0]} layers of width {found[1]}"
        )
    return logit_lens(model, head=head, translators=lens, site=lens.site, layers=layers)


def fit_tuned_lens(
    model: SiteModel,
    tokens: Int[Array, "context pos"],
    mask: Bool[Array, "context pos"] | None = None,
    config: TunedLensConfig | None = None,
    *,
    key: Array,
    head: Head | None = None,
    site: str = "resid_post",
    shuffled_targets: bool = False,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> tuple[TunedLens, list[dict[str, float]]]:
    """Trains the translators of all layers at once, Σ_layer mean_token KL(final ‖ lens).

    Args:
      tokens: contexts to train on; the model runs on each batch, nothing is stored.
      mask: True at the real tokens, the only ones that count.
      key: draws the batches, and the tokens of a batch where not all are read.
      head: as in `logit_lens`.
      shuffled_targets: the null. Every token gets the final distribution of another token of its batch, so that only
        the average distribution can be learned.
      progress: called after every compiled call with its `step` and mean `kl` per layer and token.

    Returns:
      The translators, and what `progress` was called with. The last `resid_post` is the model's output, so its
      translator stays the identity.

    Raises:
      SiteError: edits of `final_norm` or `logits`, which may depend on positions that training mixes; nothing to train.
      InputError: no contexts, or fewer real tokens than two in one of them.
    """
    config = config or TunedLensConfig()
    start = identity_lens(model, site=site)
    n_trained = len(start.bias) - (start.site == "resid_post")
    if not n_trained:
        raise SiteError(f"{model.site_table.model} has one layer, and its {site!r} is what the model outputs")
    if head is None and {"final_norm", "logits"} & unwrap(model)[1].keys():
        raise SiteError("train the tuned lens without edits of 'final_norm' and 'logits'; apply them when reading")
    if not tokens.shape[0] or int(_real(tokens, mask).sum(1).min()) < 2:
        raise InputError(f"tokens {tokens.shape}: every context needs two or more real tokens, and there must be one")

    k_scale, key = jax.random.split(key)
    rows = jax.random.choice(k_scale, tokens.shape[0], (min(config.batch_size, tokens.shape[0]),), replace=False)
    scale = _stream_size(model, tokens[rows], None if mask is None else mask[rows], start.site)
    moments = _optimiser(config).init(eqx.filter(start, eqx.is_array))
    # an array, so that the null runs the same program
    shuffled, history = jnp.asarray(shuffled_targets), []
    for step in range(0, config.steps, config.steps_per_call):
        n_steps = min(config.steps_per_call, config.steps - step)
        span = jnp.array([step, step + n_steps], jnp.int32)
        start, moments, total = _train(
            start, moments, span, model, head, tokens, mask, scale, key, config, n_trained, shuffled
        )
        history.append({"step": step + n_steps, "kl": float(total) / (n_steps * n_trained)})
        if progress is not None:
            progress(history[-1])
    return eqx.tree_at(lambda t: t.bias, start, start.bias * scale[:, None]), history


@dataclasses.dataclass(frozen=True)
class TunedLensEvaluation:
    """KL(final ‖ lens) of every layer on held-out text, in nats per token, with 95 % intervals over contexts.

    Attributes:
      tuned, logit, null: of the tuned lens, the logit lens, and translators trained on shuffled targets. The null can
        reach what the average distribution reaches, which may be better than a logit lens in the wrong basis.
      gain, gain_null: how much less than the logit lens's the KL of the tuned lens and of the null is.
      gain_over_null: how much less than the null's the KL of the tuned lens is: what the translators know of a token.
    """

    tuned: tuple[Estimate, ...]
    logit: tuple[Estimate, ...]
    null: tuple[Estimate, ...]
    gain: tuple[Estimate, ...]
    gain_null: tuple[Estimate, ...]
    gain_over_null: tuple[Estimate, ...]


def evaluate_tuned_lens(
    model: SiteModel,
    lens: TunedLens,
    null: TunedLens,
    tokens: Int[Array, "context pos"],
    mask: Bool[Array, "context pos"] | None = None,
    *,
    key: Array,
    head: Head | None = None,
    batch_size: int = 8,
) -> TunedLensEvaluation:
    """Compares a tuned lens with the logit lens and with its null, on contexts that none was trained on.

    Args:
      null: from `fit_tuned_lens(…, shuffled_targets=True)`.
      key: draws the bootstrap of contexts.

    Raises:
      SiteError: translators of another model, or of two sites.
      ValueError: fewer than two contexts.
    """
    if lens.site != null.site:
        raise SiteError(f"the tuned lens reads {lens.site!r}, its null {null.site!r}; train both on one site")
    readers = (
        tuned_lens(model, lens, head=head),
        logit_lens(model, head=head, site=lens.site),
        tuned_lens(model, null, head=head),
    )
    chunks = [slice(start, start + batch_size) for start in range(0, tokens.shape[0], batch_size)]
    tuned, logit, shuffled = (
        jnp.concatenate([_kl_of_contexts(r, tokens[c], None if mask is None else mask[c]) for c in chunks], 1)
        for r in readers
    )
    count = _real(tokens, mask).sum(1).astype(tuned.dtype)

    def estimates(total: Float[Array, "layer context"]) -> tuple[Estimate, ...]:
        return tuple(bootstrap_ratio(row, count, key=key) for row in total)

    totals = (tuned, logit, shuffled, logit - tuned, logit - shuffled, shuffled - tuned)
    return TunedLensEvaluation(*map(estimates, totals))


@eqx.filter_jit
def _kl_of_contexts(reader: Lens, tokens: Array, mask: Array | None) -> Float[Array, "layer context"]:
    return jnp.where(_real(tokens, mask)[None], reader(tokens, mask).kl, 0.0).sum(2)


def save_tuned_lens(lens: TunedLens, path: str | os.PathLike) -> None:
    """Writes a safetensors file, whole or not at all."""
    arrays = {"weight": jax.device_get(lens.weight), "bias": jax.device_get(lens.bias)}
    write_bytes(epath.Path(path), save(arrays, {"format": "mi_jax.tuned_lens", "site": lens.site}))


def load_tuned_lens(path: str | os.PathLike) -> TunedLens:
    """Reads what `save_tuned_lens` wrote.

    Raises:
      InputError: no such file, or not one of translators.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error})") from None
    if about.get("format") != "mi_jax.tuned_lens" or set(arrays) != {"weight", "bias"}:
        raise InputError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, not the translators of a tuned lens")
    return TunedLens(jnp.asarray(arrays["weight"]), jnp.asarray(arrays["bias"]), about["site"])


def _optimiser(config: TunedLensConfig) -> optax.GradientTransformation:
    return optax.adam(optax.linear_schedule(config.learning_rate, 0.0, config.steps))


@eqx.filter_jit
def _stream_size(model: SiteModel, tokens: Array, mask: Array | None, site: str) -> Float[Array, " layer"]:
    """Typical root mean square of the stream; the geometric mean, so that a few massive tokens do not set it."""
    _, acts = _run(model, tokens, mask, site)
    real = _real(tokens, mask)
    log_rms = 0.5 * jnp.log(jnp.square(in_float32(acts[site])).mean(-1) + 1e-20)
    return jnp.exp(jnp.where(real[None], log_rms, 0.0).sum((1, 2)) / real.sum().astype(log_rms.dtype))


def _run(model: SiteModel, tokens: Array, mask: Array | None, site: str) -> tuple[Array, dict[str, Array]]:
    # a foreign model may take no mask
    return model(*((tokens,) if mask is None else (tokens, mask)), capture=(at(site),))


def _real(tokens: Array, mask: Array | None) -> Bool[Array, "context pos"]:
    return jnp.ones(tokens.shape, bool) if mask is None else mask


@eqx.filter_jit
def _train(
    lens: TunedLens,
    moments: PyTree,
    span: Int[Array, "2"],
    model: SiteModel,
    head: Head | None,
    tokens: Array,
    mask: Array | None,
    scale: Array,
    key: Array,
    config: TunedLensConfig,
    n_trained: int,
    shuffled_targets: Bool[Array, ""],
) -> tuple[TunedLens, PyTree, Float[Array, ""]]:
    """Steps `span[0]` to `span[1]`; any such span of one length of training compiles once."""
    head = head or native_head(model)
    batch_size = min(config.batch_size, tokens.shape[0])
    n_tokens = min(config.tokens_per_step or batch_size * tokens.shape[1], batch_size * tokens.shape[1])

    def objective(lens, stream, target, valid):
        @jax.checkpoint
        def layer(row):
            translate, x, size = row
            x = eqx.tree_at(lambda t: t.bias, translate, translate.bias * size)(x)
            log_q = jax.nn.log_softmax(in_float32(head(x[None])[0]))
            return jnp.where(valid, kl(target, log_q), 0.0).sum() / valid.sum().astype(log_q.dtype)

        trained = jax.tree.map(lambda a: a[:n_trained], (lens, stream, scale))
        return jax.lax.map(layer, trained, batch_size=min(config.layers_at_once or n_trained, n_trained)).sum()

    def body(step, carry):
        lens, moments, total = carry
        k_rows, k_tokens = jax.random.split(jax.random.fold_in(key, step))
        rows = jax.random.choice(k_rows, tokens.shape[0], (batch_size,), replace=False)
        chosen_mask = None if mask is None else mask[rows]
        output, acts = _run(model, tokens[rows], chosen_mask, lens.site)
        order, another, valid = _draw(_real(tokens[rows], chosen_mask).reshape(-1), n_tokens, k_tokens)
        target = output.reshape(-1, output.shape[-1])[jnp.where(shuffled_targets, another, order)]
        target = jax.nn.log_softmax(in_float32(target))
        stream = acts[lens.site].reshape(len(scale), -1, acts[lens.site].shape[-1])[:, order]
        value, grads = jax.value_and_grad(objective)(lens, stream, target, valid)
        lens, moments = updated(_optimiser(config), grads, moments, lens)
        return lens, moments, total + value

    return jax.lax.fori_loop(span[0], span[1], body, (lens, moments, jnp.zeros(())))


def _draw(
    real: Bool[Array, " token"], n: int, key: Array
) -> tuple[Int[Array, " n"], Int[Array, " n"], Bool[Array, " n"]]:
    """n random tokens, the real ones first; for each another of them, in one cycle; and which are real."""
    order = jnp.argsort(jnp.where(real, jax.random.uniform(key, real.shape), 2.0))[:n].astype(jnp.int32)
    n_real = jnp.minimum(real.sum(dtype=jnp.int32), n)
    places = jnp.arange(n, dtype=jnp.int32)
    return order, order[(places + 1) % n_real], places < n_real
