"""Stage 2: a sparse dictionary of the residual stream, beside its nulls, on documents it was not trained on."""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mi_jax as mi
from experiments.estimates import with_interval
from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.subject import Outcome, Subject
from mi_jax.data import Contexts, contexts, python_topics, read_documents
from mi_jax.decomposition import Dictionary, TrainConfig, architecture, fit
from mi_jax.decomposition.activations import TopK
from mi_jax.decomposition.baselines import fit_pca, fit_random_decoder
from mi_jax.decomposition.evaluation import DENSITY_EDGES, Estimate, Evaluation, cross_entropy_recovered, evaluate
from mi_jax.decomposition.massive import massive_limit, norms
from mi_jax.features import encode_contexts, next_token_nll
from mi_jax.run import Progress

CONTEXTS_PER_BATCH = 16


class Constant(eqx.Module):
    """Mean ablation as a reconstruction."""

    value: jax.Array

    def __call__(self, x):
        return jnp.broadcast_to(self.value, x.shape)


@dataclasses.dataclass(frozen=True)
class Streams:
    """The residual stream after one layer, `[context pos d_model]`, on both sides of the split."""

    text: Contexts
    train: np.ndarray
    held_out: np.ndarray


def capture_streams(subject: Subject, config: PipelineConfig, progress: Callable[[float], None]) -> Streams:
    """Runs the model over the text up to the dictionary's layer, and no further.

    Raises:
      TextError: the text cannot be used.
      SiteError: the model has no such layer.
    """
    documents = read_documents(config.text) if config.text else python_topics()
    if config.smoke:
        documents = documents[:12]
    text = contexts(
        documents, subject.tokenizer, length=config.context, held_out_fraction=config.held_out, seed=config.seed
    )
    captured = mi.capture(subject.model, mi.at("resid_post", layers=config.layer))

    def run(tokens: np.ndarray, done: int) -> np.ndarray:
        out = np.empty((*tokens.shape, subject.model.config.d_model), np.float32)
        for start in range(0, len(tokens), CONTEXTS_PER_BATCH):
            rows = tokens[start : start + CONTEXTS_PER_BATCH]
            # the last batch is filled up, so that one program serves all
            full = np.pad(rows, ((0, CONTEXTS_PER_BATCH - len(rows)), (0, 0)))
            out[start : start + len(rows)] = mi.jit(captured)(full, output=False)[1]["resid_post"][: len(rows)]
            progress((done + start) / (len(text.train) + len(text.held_out)))
        return out

    return Streams(text, run(text.train, 0), run(text.held_out, len(text.train)))


def decomposition(subject: Subject, config: PipelineConfig, progress: Progress) -> Outcome:
    """Trains the dictionary and its frozen-decoder null, fits PCA, and splices all of them into the model."""
    streams = capture_streams(subject, config, lambda f: progress(0.3 * f, "reading text"))
    # no dictionary sees the massive tokens: position 0, and whatever has over ten times the median norm
    limit = float(massive_limit(norms(jnp.asarray(streams.train))))
    kept, held_kept = (_ordinary(stream, limit) for stream in (streams.train, streams.held_out))
    train, held_out = jnp.asarray(streams.train[kept]), jnp.asarray(streams.held_out[held_kept])
    blocks = np.broadcast_to(np.arange(len(held_kept))[:, None], held_kept.shape)[held_kept]
    mean = train.mean(0)

    shape, objective = architecture("topk", train.shape[1], config.d_sae, k=config.k)
    schedule = TrainConfig(steps=config.sae_steps, batch_size=config.sae_batch, massive_ratio=None)
    keys = jax.random.split(jax.random.key(config.seed), 4)

    def show(_, metrics):
        progress(0.3 + 0.5 * metrics["step"] / schedule.steps, "training the dictionary and its null")

    # both at once: half of a step, the scatter of its gradients, runs on one core
    with ThreadPoolExecutor(2) as pool:
        null_fit = pool.submit(fit_random_decoder, train, shape, objective, schedule, key=keys[1])
        sae, history = fit(train, shape, objective, schedule, key=keys[0], progress=show)
        null, _ = null_fit.result()
    candidates = {
        "dictionary": sae,
        "random frozen decoder": null,
        f"PCA, {config.k} components": fit_pca(train, config.k),
    }

    spliced = candidates | {"mean": Constant(mean)}
    losses = splice_losses(
        subject, streams, config.layer, spliced, limit, lambda f: progress(0.8 + 0.2 * f, "splicing in")
    )

    left_out = int((~kept).sum() + (~held_kept).sum())
    rows, scores = [], {}
    for name, candidate in candidates.items():
        scores[name] = evaluate(candidate, held_out, mean=mean, blocks=blocks, key=keys[2])
        recovered = cross_entropy_recovered(losses["clean"], losses[name], losses["mean"], key=keys[3])
        rows.append(_row(name, scores[name], recovered))
    own, frozen, pca = rows
    results = {
        "decomposition.tokens": len(train),
        "decomposition.tokens_held_out": len(held_out),
        "decomposition.tokens_left_out": left_out,
        "decomposition.steps": schedule.steps,
        "decomposition.layer": config.layer,
        "decomposition.ce_clean": float(losses["clean"].mean()),
        "decomposition.ce_mean_ablated": float(losses["mean"].mean()),
    }
    results |= with_interval("decomposition.fvu", own["fvu"], *own["fvu_ci"])
    results |= with_interval("decomposition.ce_recovered", own["ce_recovered"], *own["ce_ci"])
    for key in ("l0", "fvu", "ce_recovered", "dead_fraction"):
        results[f"decomposition.{key}"] = own[key]
        results[f"decomposition.{key}_null"] = frozen[key]
        results[f"decomposition.{key}_pca"] = pca[key]
    notes = [
        f"{left_out:,} tokens are left out of training, means and scores, and left as they "
        "are in the splice: position 0 of every context, an attention sink with about a hundred times the norm of the "
        "rest, and the few others whose norm is over ten times the median. With them, any dictionary looks perfect.",
        f"Held out are whole documents: {len(held_out):,} tokens; {len(train):,} were trained on.",
        "Dead: fires on none of the held-out tokens.",
    ]
    figures = {
        "site": "resid_post",
        "layer": config.layer,
        "notes": notes,
        "rows": rows,
        "loss_curve": {"step": [h["step"] for h in history], "fvu": [h["fvu"] for h in history]},
        "density": {
            "log10_edges": list(DENSITY_EDGES),
            "counts": scores["dictionary"].density_histogram.tolist(),
        },
    }
    arrays = sae_arrays(sae) | {"stream_sample": streams.train[:CONTEXTS_PER_BATCH]}
    for side, stream, tokens in (
        ("train", streams.train, streams.text.train),
        ("held_out", streams.held_out, streams.text.held_out),
    ):
        codes = encode_contexts(sae, stream, tokens)
        ordinary = _ordinary(stream, limit)[..., None]
        arrays[f"{side}.tokens"] = codes.tokens
        arrays[f"{side}.values"] = np.where(ordinary, codes.values, 0)
        arrays[f"{side}.indices"] = codes.indices.astype(np.int32)
    return Outcome(results, figures, arrays)


def splice_losses(
    subject: Subject,
    streams: Streams,
    layer: int,
    reconstructions: Mapping[str, eqx.Module],
    limit: float,
    progress: Callable[[float], None],
) -> dict[str, jax.Array]:
    """Mean next-token loss of every held-out context, in nats, clean and with each reconstruction spliced in.

    The prefix is not run again: the model resumes after `layer` from the stream that is spliced. Tokens that no
    dictionary is trained on (position 0, norm over `limit`) stay as they are.
    """
    tokens, stream = streams.text.held_out, streams.held_out
    batch, losses = CONTEXTS_PER_BATCH // 2, {"clean": [], **{name: [] for name in reconstructions}}
    for start in range(0, len(tokens), batch):
        rows = slice(start, start + batch)
        n = len(tokens[rows])
        x, t = (np.pad(a[rows], ((0, batch - n),) + ((0, 0),) * (a.ndim - 1)) for a in (stream, tokens))
        for name in losses:
            loss = _spliced_loss(subject.model, reconstructions.get(name), x, t, layer + 1, limit)
            losses[name].append(np.asarray(loss)[:n])
        progress(start / len(tokens))
    return {name: jnp.asarray(np.concatenate(parts)) for name, parts in losses.items()}


@eqx.filter_jit
def _spliced_loss(model, reconstruct, x, tokens, layer, limit):
    x, tokens = jnp.asarray(x), jnp.asarray(tokens)
    if reconstruct is not None:
        ordinary = (jnp.linalg.norm(x, axis=-1) <= limit).at[:, 0].set(False)
        x = jnp.where(ordinary[..., None], reconstruct(x), x)
    return next_token_nll(model.resume(x, jnp.asarray(layer, jnp.int32)), tokens)[:, 1:].mean(1)


def _ordinary(stream: np.ndarray, limit: float) -> np.ndarray:
    """True where a dictionary is trained and scored, `[context pos]`."""
    ordinary = np.linalg.norm(stream, axis=-1) <= limit
    ordinary[:, 0] = False
    return ordinary


def _row(name: str, scores: Evaluation, recovered: Estimate) -> dict:
    fvu = scores.fraction_variance_unexplained
    return {
        "name": name,
        "l0": scores.l0.value,
        "fvu": fvu.value,
        "fvu_ci": [fvu.ci_low, fvu.ci_high],
        "ce_recovered": recovered.value,
        "ce_ci": [recovered.ci_low, recovered.ci_high],
        "dead_fraction": scores.dead_fraction.value,
    }


def sae_arrays(sae: Dictionary) -> dict[str, np.ndarray]:
    """A dictionary as a flat mapping, for a checkpoint."""
    return {f"sae.{name}": np.asarray(getattr(sae, name)) for name in ("w_enc", "b_enc", "w_dec", "b_dec", "k")}


def sae_from_arrays(arrays: Mapping[str, np.ndarray]) -> Dictionary:
    """The inverse of `sae_arrays`."""
    w_enc, b_enc, w_dec, b_dec = (jnp.asarray(arrays[f"sae.{name}"]) for name in ("w_enc", "b_enc", "w_dec", "b_dec"))
    return Dictionary(w_enc, b_enc, w_dec, b_dec, TopK(int(arrays["sae.k"])))
