"""A byte-level BPE tokenizer that is trained here, on the words that the tasks use."""

import pytest
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

from mi_jax.data.tasks import agreement, ioi
from mi_jax.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    words = [*ioi.NAMES, *ioi.PLACES, *ioi.THINGS, *(noun for pair in agreement.NOUNS for noun in pair)]
    words += ["is", "are", "has", "have", "was", "were", "near", "the"]
    text = [f"The {word} and {word}, the {word} to {word}" for word in words] + list(ioi.TEMPLATES)
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(text * 3, trainer)
    return Tokenizer(bpe, 0)
