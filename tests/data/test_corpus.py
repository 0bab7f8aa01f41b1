"""Text becomes contexts, and nothing of a held-out document is trained on."""

import numpy as np
import pytest

from mi_jax.data import TextError, contexts, python_topics, read_documents


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
