"""Entropies and TF-IDF against numbers worked out by hand."""

import math

import pytest

from kedit_jax.evaluation.words import TfIdf, entropy, fluency, terms, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He said so, and left.", ["He", "said", "so", ",", "and", "left", "."]),
        ("They don't; Ada's cat can't.", ["They", "do", "n't", ";", "Ada", "'s", "cat", "ca", "n't", "."]),
        ("a well-known $1,000.50 ...", ["a", "well-known", "$", "1,000.50", "..."]),
        ("(Émile Ōta)", ["(", "Émile", "Ōta", ")"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_entropy_by_hand() -> None:
    """a b a b a: bigrams ab, ba twice each (1 bit); trigrams aba twice, bab once."""
    assert entropy("a b a b a", 2) == pytest.approx(1.0)
    trigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert entropy("a b a b a", 3) == pytest.approx(trigrams)
    assert fluency("a b a b a") == pytest.approx((2 / 3 * 1.0 + 4 / 3 * trigrams) / 2)


def test_distinct_words_have_the_logarithm_of_their_number() -> None:
    assert entropy(" ".join(map(str, range(9))), 2) == pytest.approx(math.log2(8))


def test_repetition_and_nothing() -> None:
    assert fluency("no " * 50) == 0.0
    assert [fluency(text) for text in ("", "one", "one two")] == [0.0, 0.0, 0.0]


def test_tfidf_by_hand() -> None:
    """Three documents: cat in 2 of them, dog and owl in 1 each; one-letter words do not count."""
    fitted = TfIdf.of(["A cat", "cat dog", "owl"])
    idf = {"cat": math.log(4 / 3) + 1, "dog": math.log(4 / 2) + 1, "owl": math.log(4 / 2) + 1}
    assert fitted.idf == pytest.approx(idf)
    left, right = (2 * idf["cat"], idf["dog"]), (idf["cat"], idf["owl"])
    expected = left[0] * right[0] / math.hypot(*left) / math.hypot(*right)
    assert fitted.similarity("Cat, cat, DOG and a fish", "cat owl") == pytest.approx(expected)


def test_similarity_of_like_and_unlike_texts() -> None:
    fitted = TfIdf.of(["the red cat", "the blue dog"])
    assert fitted.similarity("red cat", "red cat") == pytest.approx(1.0)
    assert fitted.similarity("red cat", "blue dog") == 0.0
    assert fitted.similarity("red cat", "unheard words") == 0.0
    assert terms("The cat, a CAT") == ["the", "cat", "cat"]
