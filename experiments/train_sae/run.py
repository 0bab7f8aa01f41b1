"""Trains a dictionary and its null from one pass of the model, then scores both on text that neither has seen."""

import dataclasses
import functools
import math
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.estimates import with_interval
from experiments.train_sae.config import TrainSAEConfig
from experiments.train_sae.subject import Subject
from mi_jax.core.errors import InputError
from mi_jax.data.activations import Shuffled
from mi_jax.decomposition import (
    Checkpoints,
    Dictionary,
    Training,
    evaluate,
    evaluate_spliced,
    fit_stream,
    load,
    massive,
    save,
)
from mi_jax.report import terminal_table
from mi_jax.run import Progress, Stage, Workdir, run_stages

BARS = {
    "train_sae.fvu": "< null",
    "train_sae.ce_recovered": "> null",
    "train_sae.kl_recovered": "> null",
}
NAMES = ("dictionary", "null")


def run_training(config: TrainSAEConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet and prints the table; returns the results.

    Raises:
      InputError: the model, the text, the store or the settings cannot be used.
      WorkdirError: the workdir holds another experiment or another config.
    """
    config = config.resolved()
    console = console or Console(highlight=False)
    subject = Subject(config)
    # what cannot work is found before anything is written
    config.dictionary(config.d_sae, config.d_sae)
    subject.model.site_table.normalise(subject.sites)
    _ = subject.text
    folder = Workdir.open(workdir, config, experiment="train_sae", tensorboard=config.tensorboard)
    stages = [
        Stage("train", "training", functools.partial(train, subject, folder), 420),
        Stage("evaluate", "scoring", functools.partial(score, subject, folder), 90),
    ]
    run_stages(folder, stages, console=console)
    results = folder.results
    console.print(terminal_table(results, None if config.smoke else BARS))
    console.print(f"{folder.path / 'results.json'}", soft_wrap=True, markup=False)
    sys.stdout.flush()
    return results


def train(subject: Subject, folder: Workdir, progress: Progress) -> dict[str, Any]:
    """Both trainings, from where the newest checkpoint left them."""
    config = subject.config
    stream = subject.stream(progress)
    trainings = trainings_of(subject, stream)
    start = 0.5 if config.store else 0.0

    def show(step: int, metrics: dict[str, float]) -> None:
        folder.log(step, **metrics)
        note = f"step {step} of {config.steps}, FVU {metrics['fvu']:.3f}, L0 {metrics['l0']:.1f}"
        progress(start + (1 - start) * step / config.steps, note)

    checkpoints = Checkpoints(folder.path / "checkpoints" / "training")
    dictionaries, curves = fit_stream(
        stream,
        trainings,
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint_every,
        progress=show,
        mesh=subject.mesh,
    )
    checkpoints.close()
    folder.save_arrays("curves", {f"{n}.{metric}": c for n, held in curves.items() for metric, c in held.items()})
    for name, dictionary in dictionaries.items():
        _save_new(dictionary, folder, name, config)
    return {
        "tokens": config.steps * config.batch_size,
        "epochs": config.steps / stream.steps_per_epoch,
        "last_fvu": _last(curves["dictionary"], "fvu", 20),
    }


def _last(curves: Mapping[str, np.ndarray], metric: str, steps: int) -> float:
    """Mean of a metric over the rows of the last steps; the last step of an epoch has fewer than the others."""
    return float(np.average(curves[metric][-steps:], weights=curves["rows"][-steps:]))


def trainings_of(subject: Subject, stream: Shuffled) -> dict[str, Training]:
    """The dictionary, and the same with directions that are never trained."""
    config = subject.config
    form = stream.source.shapes()
    shape, objective = config.dictionary(
        *(math.prod(form[name].shape) for name in (config.site, config.target_site or config.site))
    )
    training = Training(
        shape,
        objective,
        config.schedule(),
        reads=(config.site,),
        writes=(config.target_site,) if config.target_site else None,
        seed=config.seed,
    )
    return {"dictionary": training, "null": dataclasses.replace(training, frozen_decoder=True, seed=config.seed + 1)}


def score(subject: Subject, folder: Workdir, progress: Progress) -> dict[str, Any]:
    """Reconstruction and splice of both on held-out documents."""
    config = subject.config
    tokens, acts = subject.held_out()
    site = config.target_site or config.site
    read, written = (np.asarray(acts[name]) for name in (config.site, site))
    where = (np.arange(tokens.shape[1]) > 0)[None, :] & ~np.asarray(massive(jnp.asarray(read)))
    where &= ~np.isin(tokens, subject.tokenizer.special_ids)
    blocks = np.broadcast_to(np.arange(len(tokens))[:, None], where.shape)[where]
    x, y = jnp.asarray(read[where]), jnp.asarray(written[where])
    mean = y.mean(0)
    results: dict[str, Any] = {
        "train_sae.tokens": folder.load_stage("train")["tokens"],
        "train_sae.epochs": folder.load_stage("train")["epochs"],
        "train_sae.tokens_held_out": int(where.sum()),
        "train_sae.architecture": config.architecture,
    }
    for i, name in enumerate(NAMES):
        progress(i / len(NAMES), name)
        dictionary = load(folder.path / name)
        if not isinstance(dictionary, Dictionary):
            raise InputError(f"{folder.path / name} holds a {type(dictionary).__name__}, expected a dictionary")
        keys = jax.random.split(jax.random.key(config.seed + 2), 2)
        targets = None if config.target_site == "" else y
        own = evaluate(dictionary, x, mean=mean, blocks=blocks, targets=targets, key=keys[0])
        spliced = evaluate_spliced(
            subject.model,
            dictionary,
            tokens,
            site=site,
            read_site=config.site,
            layer=config.layer,
            mean=mean,
            where=where,
            key=keys[1],
        )
        scores = {
            "fvu": own.fraction_variance_unexplained,
            "l0": own.l0,
            "dead_fraction": own.dead_fraction,
            "cosine": own.cosine,
            "ce_recovered": spliced.ce_recovered_mean,
            "kl_recovered": spliced.kl_recovered_mean,
        }
        for metric, estimate in scores.items():
            if estimate is None:
                continue
            figures = with_interval(f"train_sae.{metric}", estimate.value, estimate.ci_low, estimate.ci_high)
            if name == "null":
                figures = {f"train_sae.{metric}_null": estimate.value}
            results |= figures
        if name == "dictionary":
            results |= {"train_sae.ce_clean": spliced.ce_clean.value, "train_sae.ce_spliced": spliced.ce_spliced.value}
    folder.add_results(results)
    return {}


def _save_new(dictionary: Dictionary, folder: Workdir, name: str, config: TrainSAEConfig) -> None:
    """Writes a dictionary, in place of what a run that was killed while writing has left."""
    path = folder.path / name
    if path.exists():
        shutil.rmtree(path)
    hook = f"blocks.{config.layer}.hook_{config.site.replace('.', '.hook_')}"
    save(dictionary, path, format=config.save_format, metadata={"hook_name": hook, "context_size": config.context})
