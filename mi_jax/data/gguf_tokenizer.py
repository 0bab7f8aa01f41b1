"""The tokenizer that a GGUF file carries: byte-level BPE with merges, or sentencepiece's BPE with scores.

What stands around a text is what the file says (`add_bos_token`, `add_eos_token`); where it says nothing, what
llama.cpp's reader takes: sentencepiece ("llama") and Llama 3's BPE ("llama-bpe") begin a text with the first token.
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.gguf import GGUF

# How text is cut before merging, by the name that the file gives it; None is GPT-2's own rule.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LETTERS + r"\p{N}{1,3}" + _REST,
    "qwen2": _LETTERS + r"\p{N}" + _REST,
}
# byte-level tokenizers whose models were trained with a first token; sentencepiece's were
_BOS_BY_DEFAULT = ("llama-bpe",)
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"


def read_tokenizer(file: GGUF) -> Tokenizer:
    """The file's tokenizer, as the library's.

    Raises:
      CheckpointError: another kind of tokenizer, or metadata that do not describe one.
    """
    kind, pre = file.field("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    try:
        if kind == "gpt2" and pre in _CUTS:
            tokenizer = _byte_level(file, pre)
        elif kind == "llama":
            tokenizer = _sentencepiece(file)
        else:
            raise CheckpointError(
                f"{file.path}: tokenizer {kind!r} ({pre!r}) is not read; sentencepiece ('llama') is, and byte-level "
                f"BPE ('gpt2') of the kinds {', '.join(_CUTS)}"
            )
        _add_special(tokenizer, file)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare exceptions for whatever is wrong with a vocabulary
        raise CheckpointError(f"{file.path}: the metadata describe no tokenizer ({error})") from error
    return tokenizer


def _byte_level(file: GGUF, pre: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(file), merges=merges, ignore_merges=pre == "llama-bpe"))
    cut = _CUTS[pre]
    if cut is None:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        steps = [
            pre_tokenizers.Split(Regex(cut), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUF) -> Tokenizer:
    """Pieces merge in the order of their scores; what no piece covers becomes bytes."""
    tokens, scores = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.scores")
    vocabulary = _vocabulary(file)
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = [
        (rank, vocabulary[token[:cut]], vocabulary[token[cut:]], (token[:cut], token[cut:]))
        for rank, token in zip(scores, tokens, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[merge[3] for merge in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _vocabulary(file: GGUF) -> dict[str, int]:
    return {token: i for i, token in enumerate(file.field("tokenizer.ggml.tokens"))}


def _add_special(tokenizer: Tokenizer, file: GGUF) -> None:
    """Tokens that stand for themselves wherever they are written, and those around a text."""
    tokens = file.field("tokenizer.ggml.tokens")
    kinds = file.get("tokenizer.ggml.token_type", ())
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [token for token, one in zip(tokens, kinds, strict=False) if one == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in chosen]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    around: dict[str, list[int]] = {"bos": [], "eos": []}
    for name, chosen in around.items():
        if file.get(f"tokenizer.ggml.add_{name}_token", name == "bos" and _begins_with_bos(file)):
            chosen.append(_special(file, name))
    if any(around.values()):
        frame(tokenizer, around["bos"], around["eos"])


def _begins_with_bos(file: GGUF) -> bool:
    """What llama.cpp's reader takes where a file does not say it."""
    kind = file.field("tokenizer.ggml.model")
    return kind == "llama" or (kind == "gpt2" and file.get("tokenizer.ggml.pre", "default") in _BOS_BY_DEFAULT)


def _special(file: GGUF, name: str) -> int:
    field, tokens = f"tokenizer.ggml.{name}_token_id", file.field("tokenizer.ggml.tokens")
    # those of the first Llama stand for a sentencepiece file that names none
    usual = _SENTENCEPIECE_IDS[name] if file.field("tokenizer.ggml.model") == "llama" else None
    token = int(file.field(field) if usual is None else file.get(field, usual))
    if not 0 <= token < len(tokens):
        raise CheckpointError(f"{file.path}: {field} is {token}, and the vocabulary has {len(tokens)} tokens")
    return token


def frame(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int]) -> None:
    """Lets the library's tokenizer put these tokens before and after every text."""
    name = {i: str(tokenizer.id_to_token(i)) for i in (*before, *after)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(name[i] for i in before), "$A", *(name[i] for i in after)],
        special_tokens=[(token, i) for i, token in name.items()],
    )
