"""Whatever the tokenizer, the pairs that are kept align and the answers are one token."""

import re

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as BPE
from tokenizers import models, pre_tokenizers, processors

from mi_jax.core.errors import InputError
from mi_jax.data.tasks import TASKS, from_text, ioi, make
from mi_jax.data.tasks.capitals import CAPITALS
from mi_jax.data.tasks.prompts import Pair, draw_task, fill
from mi_jax.data.tasks.pronouns import FEMALE, MALE
from mi_jax.data.tokenizer import Tokenizer
from tests.data.tasks.conftest import made

N = 12


def texts(tokenizer, tokens, mask):
    return [tokenizer.decode(row[m]) for row, m in zip(np.asarray(tokens), np.asarray(mask), strict=True)]


def choices(tokenizer, tokens, weight=None):
    tokens = np.asarray(tokens).reshape(len(tokens), -1)
    kept = np.ones(tokens.shape, bool) if weight is None else np.asarray(weight) != 0
    return [[tokenizer.decode([int(t)]).strip() for t in row[k]] for row, k in zip(tokens, kept, strict=True)]


def rows(tokenizer, task):
    """Clean and counterfactual prompt, answers and distractors of every pair, as text."""
    return zip(
        texts(tokenizer, task.clean, task.mask),
        texts(tokenizer, task.corrupt, task.mask),
        choices(tokenizer, task.answer, task.answer_weight),
        choices(tokenizer, task.distractor, task.distractor_weight),
        strict=True,
    )


@pytest.mark.parametrize("name", TASKS)
def test_pairs_align_and_answers_follow(any_tokenizer, name):
    task = make(name, any_tokenizer, N, seed=3)
    assert len(task) == N
    assert ((task.clean != task.corrupt) & task.mask).any(1).all()
    assert ((task.clean == task.corrupt) | task.mask).all()
    assert task.templates is not None
    assert task.roles is not None
    np.testing.assert_array_equal(task.roles["END"], task.position)
    assert task.difficulty == TASKS[name].difficulty
    assert "SmolLM2-135M" in task.difficulty
    for at in task.roles.values():
        assert ((at >= 0) & (at <= task.position)).all()
    for prompt, other, right, wrong in rows(any_tokenizer, task):
        assert len(any_tokenizer.encode(prompt)) == len(any_tokenizer.encode(other))
        assert right
        assert wrong
        assert not set(right) & set(wrong)
    again, other = (make(name, any_tokenizer, N, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(task.clean, again.clean)
    assert task.clean.shape != other.clean.shape or (task.clean != other.clean).any()


@pytest.mark.parametrize("counterfactual", ["swap", "third", "abc"])
def test_ioi_names_stand_at_their_roles(any_tokenizer, counterfactual):
    task = make("ioi", any_tokenizer, N, seed=0, counterfactual=counterfactual)
    assert task.roles is not None
    clean, corrupt, i = np.asarray(task.clean), np.asarray(task.corrupt), np.arange(N)
    at = {role: np.asarray(place) for role, place in task.roles.items()}
    np.testing.assert_array_equal(clean[i, at["IO"]], task.answer)
    np.testing.assert_array_equal(clean[i, at["S1"]], task.distractor)
    np.testing.assert_array_equal(clean[i, at["S2"]], task.distractor)
    np.testing.assert_array_equal(at["S1+1"], at["S1"] + 1)
    assert (at["S1"] < at["IO"]).sum() == N / 2
    changed = {"swap": 1, "third": 1, "abc": 3}[counterfactual]
    np.testing.assert_array_equal((clean != corrupt).sum(1), changed)
    new = corrupt[i, at["S2"]]
    assert (new == np.asarray(task.answer)).all() == (counterfactual == "swap")
    assert (new != np.asarray(task.distractor)).all()


def test_greater_than_splits_the_years_at_the_first(any_tokenizer):
    task = make("greater-than", any_tokenizer, N, seed=1)
    assert task.measure == "probability-difference"
    for prompt, other, right, wrong in rows(any_tokenizer, task):
        century, year, again = re.search(r"(\d\d)(\d\d)\D+(\d\d)$", prompt).groups()
        assert century == again
        assert re.search(r"(\d\d)(\d\d)\D+(\d\d)$", other).groups() == (century, "01", again)
        whole = len(right[0]) == 2
        first = int(year) if whole else int(year[0])
        assert {int(y) for y in right} == set(range(first + 1, 100 if whole else 10))
        assert {int(y) for y in wrong} == set(range(first + whole))


def test_docstring_asks_for_the_third_argument(any_tokenizer):
    task = make("docstring", any_tokenizer, N, seed=2)
    for prompt, other, right, wrong in rows(any_tokenizer, task):
        arguments = re.search(r"\(self, (.*)\):", prompt)[1].replace(" ", "").split(",")
        assert right == [arguments[2]]
        assert set(wrong) == set(arguments) - set(right)
        documented = [word.strip() for word in re.findall(r"param (\S+):", prompt)]
        assert documented == arguments[:2]
        assert not set(arguments) & set(re.findall(r"\w+", other))


def test_sums_capitals_and_pronouns_are_right(any_tokenizer):
    for prompt, other, right, wrong in rows(any_tokenizer, make("arithmetic", any_tokenizer, N, seed=0)):
        for text, answers in ((prompt, right), (other, wrong)):
            a, b = re.search(r"(\d+)\+(\d+)=$", text).groups()
            assert answers == [str(int(a) + int(b))]
        for a, b, c in re.findall(r"(\d+)\+(\d+)=(\d+)", prompt):
            assert int(a) + int(b) == int(c)
    capital = dict(CAPITALS)
    for prompt, other, right, wrong in rows(any_tokenizer, make("capitals", any_tokenizer, N, seed=0)):
        for text, answers in ((prompt, right), (other, wrong)):
            assert answers == [capital[c] for c in re.findall(r"\w+", text) if c in capital]
    for prompt, other, right, wrong in rows(any_tokenizer, make("gendered-pronouns", any_tokenizer, N, seed=0)):
        for text, answers in ((prompt, right), (other, wrong)):
            names = set(re.findall(r"\w+", text))
            assert answers == (["she"] if names & set(FEMALE) else ["he"])
            assert bool(names & set(FEMALE)) != bool(names & set(MALE))


def test_induction_repeats_a_piece_and_asks_what_came_next(any_tokenizer):
    for prompt, other, right, wrong in rows(any_tokenizer, make("induction", any_tokenizer, N, seed=0)):
        for text, answers in ((prompt, right), (other, wrong)):
            listed, piece = text.split()[:10], text.split()[10:]
            start = listed.index(piece[0])
            assert listed[start : start + 3] == piece
            assert answers == [listed[start + 3]]
    with pytest.raises(InputError, match="repeated from 1 to length − 2"):
        make("induction", any_tokenizer, 1, seed=0, length=4, repeated=3)


def test_agreement_is_balanced_over_numbers(any_tokenizer):
    task = make("subject-verb-agreement", any_tokenizer, N, seed=0, variants=("simple", "object relative"))
    singular = [right[0] in ("is", "has", "was") for _, _, right, _ in rows(any_tokenizer, task)]
    assert singular == [True, False] * (N // 2)
    with pytest.raises(InputError, match=r"no variants \['hard'\]; there are simple, near"):
        make("subject-verb-agreement", any_tokenizer, 1, seed=0, variants=("hard",))


def pairs(words, answer=" Paris"):
    for i in range(1000):
        yield Pair(fill("in {w} is", w="Peru"), fill("in {w} is", w=words[i % len(words)]), [answer], [" Rome"])


def test_pairs_that_do_not_align_are_dropped_and_counted(tokenizer):
    length = {word: len(tokenizer.encode(f"in {word} is")) for word in ("Peru", "Cuba", "Liechtenstein")}
    assert length["Liechtenstein"] > length["Peru"] == length["Cuba"]
    task = draw_task("t", tokenizer, pairs(["Cuba", "Liechtenstein"]), 4)
    assert len(task) == 4
    assert task.dropped.startswith("3 of 7 prompts dropped: 3 × clean and counterfactual prompt of different length")
    assert "'in Liechtenstein is' is" in task.dropped
    with pytest.raises(InputError, match=r"0 prompts align with this tokenizer, 4 are wanted; 180 of 180 .* dropped"):
        draw_task("t", tokenizer, pairs(["Liechtenstein"]), 4)
    with pytest.raises(InputError, match="180 × an answer that is not one token after its prompt"):
        draw_task("t", tokenizer, pairs(["Cuba"], " Liechtenstein"), 4)
    with pytest.raises(InputError, match="answers and distractors share a token"):
        draw_task("t", tokenizer, pairs(["Cuba"], " Rome"), 4)
    with pytest.raises(InputError, match="there are no more than 2"):
        draw_task("t", tokenizer, list(pairs(["Cuba"]))[:2], 4)
    with pytest.raises(InputError, match="n=0; draw at least one pair"):
        draw_task("t", tokenizer, pairs(["Cuba"]), 0)


def test_a_word_that_moves_is_dropped_although_the_lengths_are_equal(tokenizer):
    moved = Pair(fill("a {w} the the", w="Peru"), fill("a the {w} the", w="Peru"), [" Paris"], [" Rome"])
    with pytest.raises(InputError, match="a word at different positions"):
        draw_task("t", tokenizer, [moved], 1)


def test_own_prompts(tokenizer):
    task = from_text(
        "mine",
        tokenizer,
        ["The capital of Peru is", "In Cuba"],
        ["The capital of Iran is", "In Iran"],
        [" Lima", [" Havana", " Paris"]],
        [" Rome", " Rome"],
    )
    assert choices(tokenizer, task.answer, task.answer_weight) == [["Lima"], ["Havana", "Paris"]]
    np.testing.assert_allclose(task.answer_weight, [[1, 0], [0.5, 0.5]])
    for wrong, message in (
        (
            {"corrupt": ["The capital of Liechtenstein is"]},
            "prompt 0: clean and counterfactual prompt of different length",
        ),
        ({"answers": [" Liechtenstein"]}, "prompt 0: an answer that is not one token after its prompt"),
        ({"answers": []}, "1 clean and 1 counterfactual prompts, 0 answers and 1 distractors"),
        ({"clean": [], "corrupt": [], "answers": [], "distractors": []}, "has no prompts"),
        ({"clean": [""], "corrupt": [""]}, "an empty prompt"),
    ):
        given = {"clean": ["The capital of Peru is"], "corrupt": ["The capital of Iran is"], "answers": [" Lima"]}
        given |= {"distractors": [" Rome"]} | wrong
        with pytest.raises(InputError, match=message):
            from_text("mine", tokenizer, **given)


def test_wrong_names_are_answered_with_the_right_ones(tokenizer):
    with pytest.raises(InputError, match="no task 'iio'; there are arithmetic, capitals, docstring, gendered-pronouns"):
        make("iio", tokenizer, 1, seed=0)
    with pytest.raises(InputError, match="no counterfactual 'none'; there are 'swap', 'third' and 'abc'"):
        # past the check of types that only tests have
        ioi.indirect_object_identification.__wrapped__(tokenizer, 1, seed=0, counterfactual="none")
    with pytest.raises(InputError, match="largest=2; sums go up to 3"):
        make("arithmetic", tokenizer, 1, seed=0, largest=2)


@pytest.mark.parametrize("kind", ["two digits", "one digit", "sentencepiece"])
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("around", ["<bos> $A", "<bos> $A <eos>", "$A <eos>"])
def test_prompts_begin_as_the_model_was_trained_and_do_not_end(kind, name, around):
    """By default; the first token moves all positions, and what ends a text has no place in a prompt."""
    bpe = BPE.from_str(made(kind).bpe.to_str())
    bpe.add_special_tokens(["<bos>", "<eos>"])
    special = [(token, bpe.token_to_id(token)) for token in ("<bos>", "<eos>")]
    bpe.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    plain = make(name, made(kind), N, seed=0)
    left_out = make(name, Tokenizer(bpe, 0), N, seed=0, special_tokens=False)
    first = make(name, Tokenizer(bpe, 0), N, seed=0)
    n = int(around.startswith("<bos>"))
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, left_out))
    for which in ("clean", "corrupt", "mask"):
        np.testing.assert_array_equal(getattr(first, which)[:, n:], getattr(plain, which))
    np.testing.assert_array_equal(first.clean[:, :n], special[0][1])
    np.testing.assert_array_equal(first.answer, plain.answer)
    np.testing.assert_array_equal(first.position, plain.position + n)
    assert plain.roles is not None
    assert first.roles is not None
    for role, at in plain.roles.items():
        np.testing.assert_array_equal(first.roles[role], at + n)


def test_smollm2_has_no_first_token_so_nothing_changes():
    smollm2 = made("smollm2")
    for name in TASKS:
        default, without = (make(name, smollm2, N, seed=0, **options) for options in ({}, {"special_tokens": False}))
        assert jax.tree.all(jax.tree.map(np.array_equal, default, without))


def bytes_only() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = BPE(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    return Tokenizer(bpe, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ioi", r"3 one-token names, a place and a thing; the tokenizer has \[\]"),
        ("docstring", "0 argument names and 0 words are one token with this tokenizer"),
        ("subject-verb-agreement", "no noun of the list is one token in both numbers"),
        ("gendered-pronouns", "0 female and 0 male names are one token"),
        ("capitals", "0 of the capitals are one token with this tokenizer, two are needed"),
        ("induction", "this tokenizer has 0 of the words as one token"),
    ],
)
def test_a_tokenizer_of_bytes_has_no_words(name, message):
    with pytest.raises(InputError, match=message):
        make(name, bytes_only(), 1, seed=0)


def test_years_that_are_cut_otherwise_are_refused():
    whole = bytes_only()
    whole.bpe.add_tokens(["174"])
    with pytest.raises(InputError, match=r"this tokenizer cuts a year into .*'174', '2'\]; the task needs"):
        make("greater-than", whole, 1, seed=0)


@pytest.mark.parametrize("place", range(4))
def test_one_text_is_no_list_of_prompts(tokenizer, place):
    given = [["The boy"], ["The girl"], [" is"], [" was"]]
    given[place] = given[place][0]
    with pytest.raises(InputError, match="has one entry for every pair; got one text"):
        from_text("mine", tokenizer, *given)
