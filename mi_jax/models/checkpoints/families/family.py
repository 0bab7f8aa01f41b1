"""A model family of Hugging Face: a mapping of config.json to a configuration, and a table of tensor names."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.checkpoints.names import Stored
from mi_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one family are stored.

    Attributes:
      model_type: as config.json has it.
      architecture: the class of `transformers` that a saved model is for.
      heads: endings of the `architectures` that are read; empty means any.
      read: the configuration from the keys of config.json.
      write: the keys of config.json from a configuration; it need not check that they can express it.
      table: where each parameter lies.
      ignored: regular expressions of whole names of tensors that the model has no use for.
      variants: `(expression, replacement)` pairs that turn names of the table into those of other files of the family.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    table: Callable[[DecoderConfig], tuple[Stored, ...]]
    ignored: tuple[str, ...] = ()
    variants: tuple[tuple[str, str], ...] = ()
    heads: tuple[str, ...] = ("Model", "LMHeadModel", "ForCausalLM")

    def config(self, hf: Mapping[str, Any]) -> DecoderConfig:
        """The configuration that a config.json describes.

        Raises:
          CheckpointError: a value is wrong, or asks for what the decoder lacks; the key is named.
        """
        fields = Fields(hf, f"config.json of a {self.model_type} model")
        fields.only("is_encoder_decoder", False, None)
        fields.only("quantization_config", None)
        for each in fields.several("architectures") or ():
            if self.heads and not str(each).endswith(self.heads):
                raise fields.refused("architectures", each, "classes named " + ", ".join(f"…{h}" for h in self.heads))
        try:
            config = self.read(fields)
        except CheckpointError:
            raise
        except (ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{fields.where} does not describe a decoder: {error}") from error
        fields.close()
        if config.d_mlp < 1:
            raise CheckpointError(
                f"{fields.where}: the MLP has {config.d_mlp} components; the family has no model without"
            )
        return dataclasses.replace(config, name=str(hf.get("_name_or_path") or self.model_type))

    def names(self, config: DecoderConfig, present: Collection[str] = ()) -> tuple[Stored, ...]:
        """Where each parameter lies.

        Args:
          config: of the decoder.
          present: names of the tensors in a file. The table then has those of the known spellings that are there;
            without them it has the spelling that is written.
        """
        there = frozenset(present)
        return tuple(self._as_present(stored, there) for stored in self.table(config))

    def _as_present(self, stored: Stored, present: frozenset[str]) -> Stored:
        for some in itertools.product((False, True), repeat=len(self.variants)):
            name = stored.name
            for expression, replacement in itertools.compress(self.variants, some):
                name = re.sub(expression, replacement, name)
            if name.format(layer=0, expert=0) in present:
                return dataclasses.replace(stored, name=name)
        return stored

    def copies(self, config: DecoderConfig, present: Collection[str]) -> tuple[tuple[str, str], ...]:
        """Pairs of tensors in a file that have to be equal: the unembedding, where it is tied, and the embedding."""
        if not config.tied:
            return ()
        embed = [stored.name for stored in self.names(config, present) if stored.path == "embed"]
        found = [name for name in present if re.fullmatch(r"(.*\.)?(lm_head|embed_out)\.weight", name)]
        return tuple((name, embed[0]) for name in sorted(found))

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The config.json that `transformers` reads to the same model.

        Raises:
          CheckpointError: the family has no model of this configuration; the fields are named that it cannot express.
        """
        # which tokens begin, end and pad a text is the tokenizer's business: without these keys the reference takes
        # those of the family's first model, which may lie outside of this vocabulary
        hf: dict[str, Any] = {f"{kind}_token_id": None for kind in ("bos", "eos", "pad")}
        try:
            hf |= {"architectures": [self.architecture], "model_type": self.model_type, **self.write(config)}
        except ArithmeticError as error:
            raise CheckpointError(f"a {self.model_type} model cannot have {config}: {error}") from error
        again, fields = self.config(hf), dataclasses.fields(config)
        differ = [f.name for f in fields if f.name != "name" and getattr(again, f.name) != getattr(config, f.name)]
        if differ:
            shown = ", ".join(f"{name}={getattr(config, name)!r}" for name in differ[:8])
            raise CheckpointError(f"a {self.model_type} model cannot have {shown}")
        return hf
