"""Tokenizers built from a checkpoint's own vocabulary."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer as _BPE
from tokenizers import decoders, models, pre_tokenizers

from mi_jax.models.checkpoints.gguf import GGUF, CheckpointError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    bpe: _BPE
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token before it; bytes that the vocabulary lacks are dropped."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def strings(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Each token as text; bytes that are not whole characters show as the replacement character."""
        return [self.decode([i]) for i in ids]

    def single(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
          ValueError: it is several tokens.
        """
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens ({self.strings(ids)}), not one")
        return ids[0]

    def batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded ids and the mask of real tokens, both `[batch pos]`."""
        rows = [self.encode(text) for text in texts]
        n = max(len(row) for row in rows)
        tokens = np.full((len(rows), n), self.pad_id, np.int32)
        mask = np.zeros((len(rows), n), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return tokens, mask


def tokenizer_from_gguf(file: GGUF) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file carries.

    Raises:
      CheckpointError: the file has another kind of tokenizer.
    """
    kind, pre = file.field("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in ("smollm", "default", "gpt-2"):
        raise CheckpointError(f"{file.path}: tokenizer {kind!r} ({pre!r}) is not read; byte-level BPE is")
    tokens = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    bpe = _BPE(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    return Tokenizer(bpe, int(file.get("tokenizer.ggml.padding_token_id", 0)))
