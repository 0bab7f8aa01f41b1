"""The model and the text that a dictionary is trained on, and the stream of activations between them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import mi_jax as mi
from experiments.train_sae.config import TrainSAEConfig
from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.data import (
    ActivationStore,
    ActivationStream,
    Contexts,
    StoredActivations,
    Tokenizer,
    contexts,
    load_tokenizer,
    python_docstrings,
    python_topics,
    read_documents,
    write_activations,
)
from mi_jax.data.activations import Shuffled
from mi_jax.models import Decoder, smollm2_path
from mi_jax.run import Progress


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, its text and the sites that are read and predicted."""

    config: TrainSAEConfig

    @functools.cached_property
    def model(self) -> Decoder:
        model = mi.load(self.config.model or smollm2_path(), mesh=self.mesh)
        if not 0 <= self.config.layer < model.config.n_layers:
            raise InputError(f"config.layer={self.config.layer}: the model has layers 0–{model.config.n_layers - 1}")
        if not 2 <= self.config.context <= model.config.n_ctx:
            raise InputError(f"config.context={self.config.context}: the model takes 2 to {model.config.n_ctx} tokens")
        return model

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        sizes = {"data": self.config.data, "fsdp": self.config.fsdp, "model": self.config.model_axis}
        return None if set(sizes.values()) == {1} else sharding.make_mesh(**sizes)

    @functools.cached_property
    def text(self) -> Contexts:
        config = self.config
        documents = read_documents(config.text) if config.text else python_topics() + python_docstrings()
        if config.smoke:
            documents = documents[:40]
        return contexts(
            documents, self.tokenizer, length=config.context, held_out_fraction=config.held_out, seed=config.seed
        )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.model or smollm2_path())

    @property
    def sites(self) -> list[mi.At]:
        """What is captured: the site that is read, and the one that is predicted."""
        config = self.config
        read = mi.at(config.site, layers=config.layer)
        if not config.target_site:
            return [read]
        if config.target_site == config.site:
            raise InputError("a transcoder's target is another site than the one it reads")
        return [read, mi.at(config.target_site, layers=config.layer)]

    def stream(self, progress: Progress) -> Shuffled:
        """Shuffled batches: straight from the model, or from the store, which is written first."""
        config, key = self.config, jax.random.key(self.config.seed)
        sizes: dict[str, Any] = {"batch_size": config.batch_size, "buffer_size": config.buffer_size}
        text, left_out = self.text.train, self.tokenizer.special_ids
        if not config.store:
            return ActivationStream(
                self.model, text, self.sites, key=key, special_ids=left_out, mesh=self.mesh, **sizes
            )

        def show(done: float) -> None:
            progress(0.5 * done, "writing activations")

        write_activations(config.store, self.model, text, self.sites, key=key, special_ids=left_out, progress=show)
        store = ActivationStore.open(config.store)
        return StoredActivations(store, key=key, mesh=self.mesh, **sizes)

    def held_out(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Held-out tokens and their activations by site, `[context pos width]`."""
        tokens = self.text.held_out[: self.config.evaluated_contexts]
        captured = mi.capture(self.model, *self.sites)
        parts = [
            mi.jit(captured)(_filled(tokens[start : start + 16], 16), output=False)[1]
            for start in range(0, len(tokens), 16)
        ]
        return tokens, {
            site.site: np.concatenate([np.asarray(part[site.site], np.float32) for part in parts])[: len(tokens)]
            for site in self.sites
        }


def _filled(rows: np.ndarray, n: int) -> np.ndarray:
    """Rows with zeros after the last, so that one program serves all."""
    return np.pad(rows, ((0, n - len(rows)), (0, 0)))
