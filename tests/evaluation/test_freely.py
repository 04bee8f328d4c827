"""Free answers and sampled texts, on a random model and on one that has to say a certain thing."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from evaluation_world import plain_logits, random_model

from kedit_jax.errors import KeditError
from kedit_jax.evaluation import Fact, Record, completions, freely, words
from kedit_jax.evaluation.completions import complete_until, sample_texts
from kedit_jax.models import Decoder, ModelConfig

PROMPTS = ["Ada Quill was born in", "The", "Émile {} saw"]


@pytest.fixture(scope="module")
def sampled(model: Decoder, tokenizer: Any) -> list[str]:
    return sample_texts(model, tokenizer, PROMPTS, max_tokens=24, seed=1)


def test_sampled_texts_begin_with_their_prompts_and_repeat(model: Decoder, tokenizer: Any, sampled: list[str]) -> None:
    assert all(text.startswith(prompt) for text, prompt in zip(sampled, PROMPTS, strict=True))
    assert sampled == sample_texts(model, tokenizer, PROMPTS, max_tokens=24, seed=1)
    assert sampled != sample_texts(model, tokenizer, PROMPTS, max_tokens=24, seed=2)


def test_sampled_tokens_are_among_the_likeliest(model: Decoder, tokenizer: Any) -> None:
    """The first new token of each prompt is one of the five that a naive pass finds likeliest, and not always the same."""
    rows = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    likeliest = [set(np.argsort(plain_logits(model, row)[-1])[-5:].tolist()) for row in rows]
    n_new = 24 - min(map(len, rows))
    first = []
    for seed in range(6):
        found = completions._continued(rows, model, n_new, (), completions.Sampling(5, seed))
        first.append([ids[0] for ids in found])
        assert all(token in allowed for token, allowed in zip(first[-1], likeliest, strict=True))
    assert len({row[1] for row in first}) > 1


def test_a_text_ends_where_the_model_has_no_more_positions(
    model: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    limit = model.config.max_positions

    def silent(model: Decoder, tokens: Any, valid: Any, n_new: int, **_: Any) -> np.ndarray:
        asked.append(int(valid.sum(1).max()) + n_new)
        return np.zeros((len(tokens), n_new), np.int32)

    monkeypatch.setattr(completions, "generate", silent)
    sample_texts(model, tokenizer, PROMPTS, max_tokens=1000)
    sample_texts(model, tokenizer, PROMPTS[:1], max_tokens=30)
    complete_until(model, tokenizer, PROMPTS, (), max_new_tokens=1000)
    assert asked == [limit + 1, 30, limit + 1], "the last new token takes no position"
    with pytest.raises(KeditError, match=r"1 'Ada Quill was born in': \d+ tokens"):
        sample_texts(model, tokenizer, PROMPTS[:1], max_tokens=3)
    assert sample_texts(model, tokenizer, []) == []


def test_up_to_the_first_mark(model: Decoder, tokenizer: Any) -> None:
    rows = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    ids = completions._continued(rows, model, 6, completions._end_ids(model, tokenizer))
    mark = tokenizer.decode(ids[0][2]).strip()[0]

    def expected(row: list[int]) -> str:
        holding = [i for i, token in enumerate(row) if mark in tokenizer.decode([token])]
        return tokenizer.decode(row[: holding[0] + 1] if holding else row).removeprefix(" ")

    until = complete_until(model, tokenizer, PROMPTS, (mark,), max_new_tokens=6)
    assert until == [expected(row) for row in ids]
    long = "Ada Quill saw " * (model.config.max_positions // 3)
    with pytest.raises(KeditError, match="positions are needed"):
        complete_until(model, tokenizer, [long], ())
    assert len(until[0]) < len(tokenizer.decode(ids[0]))


@pytest.mark.parametrize(
    ("wanted", "text", "said", "exact", "begins"),
    [
        ("Oslo", "Oslo. The town", "Oslo", True, True),
        ("Oslo", "Oslo", "Oslo", True, True),
        ("Oslo", "\nOslo, a town", "Oslo", True, True),
        ("Oslo", "Oslo and Rome.", "Oslo and Rome", False, True),
        ("Oslo", "Oslow is it", "Oslow is it", False, False),
        ("Oslo", "Rome, not Oslo", "Rome", False, False),
        ("Oslo", "oslo.", "oslo", False, False),
        ("Oslo", "", "", False, False),
        ("St. Gallen", "St. Gallen. It", "St. Gallen", True, True),
        ("St. Gallen", "St. Moritz. It", "St", False, False),
        ("U.S.", "U.S. army. It", "U.S. army", False, True),
    ],
)
def test_what_counts_as_said(wanted: str, text: str, said: str, exact: bool, begins: bool) -> None:
    found = freely._said(text, wanted)
    assert found == (said, exact, begins)


class Told:
    """Stands in for a model: says what it was told, up to the first token with a mark, tokens being letters."""

    def __init__(self, said: dict[str, str]) -> None:
        self.said, self.marks = said, dict[str, tuple[str, ...]]()

    def __call__(self, _: Any, __: Any, prompts: list[str], marks: tuple[str, ...], **___: Any) -> list[str]:
        self.marks |= dict.fromkeys(prompts, marks)
        texts = [self.said.get(prompt, "nothing. At all") for prompt in prompts]
        return [text[: next((i + 1 for i, c in enumerate(text) if c in marks), len(text))] for text in texts]


def test_shares_of_what_is_said(model: Decoder, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = records[0], replace(records[1], target_new="St. Gallen", target_true=None, paraphrase_prompts=())
    second = replace(second, neighborhood_facts=(Fact("Vera Lund saw", "Lima"), Fact("Otto saw", "Rome")))
    told = Told(
        {
            first.rewrite_prompt: f"{first.target_new}. It is a town.",
            first.paraphrase_prompts[0]: f"{first.target_new} in the north, far away",
            first.neighborhood_prompts[1]: f"{first.target_true}, he says",
            second.rewrite_prompt: "St. Gallen, they say",
            "Otto saw": "Rome\nand more",
        }
    )
    monkeypatch.setattr(freely, "complete_until", told)
    found = freely.answers(model, None, [first, second])
    assert told.marks[second.rewrite_prompt] == (), "an object with a stop in it is let past it"
    assert told.marks[first.rewrite_prompt] == freely.STOPS
    assert found.efficacy == found.efficacy_begins == 100
    assert (found.generalization, found.generalization_begins) == (0, 50)
    assert found.specificity == pytest.approx(100 * (1 / 3 + 1 / 2) / 2), "of a record first, then of the records"
    assert found.n == 2
    assert len(found.answers) == 1 + 2 + 3 + 1 + 2
    assert set(found.to_dict()) == {
        "efficacy", "generalization", "specificity", "efficacy_begins", "generalization_begins", "specificity_begins", "n",
    }  # fmt: skip
    monkeypatch.setattr(freely, "complete_until", Told({}))
    nothing = freely.answers(model, None, [first])
    assert (nothing.efficacy, nothing.efficacy_begins, nothing.specificity) == (0, 0, 0), "negative control"
    bare = replace(first, paraphrase_prompts=(), neighborhood_prompts=())
    none = freely.answers(model, None, [bare])
    assert (none.generalization, none.specificity) == (None, None)


def test_references_are_of_other_subjects(records: list[Record]) -> None:
    first = replace(records[0], attribute_prompts=("Vera Lund comes from", f"{records[0].subject} comes from"))
    about = freely.references_of([first, *records[1:]]).about(first)
    assert f"Vera Lund comes from {first.target_new}." in about
    assert not [text for text in about if records[0].subject in text]
    holders = [r for r in records[1:] if r.target_true == first.target_new]
    assert holders
    assert {f"{r.rewrite_prompt} {r.target_true}." for r in holders} <= set(about)


def test_references_of_a_corpus_are_whole_sentences(records: list[Record]) -> None:
    wanted = replace(records[0], target_new="Lisk")
    other = replace(records[1], target_new="Upper Lisk")
    texts = ["Ann left Lisk. Bob likes Upper Lisk! The Lisker sings. Ada Quill saw Lisk."]
    found = freely.references_in(texts, [wanted, other])
    assert found.about(wanted) == ["Ann left Lisk."], "neither another town, nor a longer word, nor the subject itself"
    assert found.about(other) == ["Bob likes Upper Lisk!"]
    assert found.about(replace(wanted, target_new="Oslo")) == []


def test_fluency_and_consistency(model: Decoder, tokenizer: Any, records: list[Record]) -> None:
    some = [replace(record, generation_prompts=tuple(PROMPTS[:2])) for record in records[:2]]
    some[1] = replace(some[1], target_new="nothing known of it")
    references = freely.references_of(records)
    found = freely.write_texts(model, tokenizer, some, references, max_tokens=24, seed=1)
    assert (found.n, found.n_consistency) == (2, 1)
    assert [len(row.texts) for row in found.written] == [2, 2]
    shares = [np.mean([words.fluency(text) for text in row.texts]) for row in found.written]
    assert found.fluency == pytest.approx(100 * np.mean(shares))
    joined = " ".join(found.written[0].texts), " ".join(references.about(some[0]))
    assert found.consistency == pytest.approx(100 * references.tfidf.similarity(*joined))
    none = freely.write_texts(model, tokenizer, [replace(records[0], generation_prompts=())], references)
    assert none.to_dict() == {"fluency": None, "consistency": None, "n": 0, "n_consistency": 0}


def test_a_model_that_repeats_itself_is_not_fluent(
    config: ModelConfig, model: Decoder, tokenizer: Any, records: list[Record]
) -> None:
    """Negative control: with one token far ahead of all others, n-grams have next to no entropy left."""
    token = tokenizer(" Lima").input_ids[0]
    final = model.final_norm.bias[...] + 100 * model.embedding[...][token]
    stuck = jax.tree_util.tree_map_with_path(
        lambda path, leaf: final if "final_norm" in str(path) and "bias" in str(path) else leaf, model
    )
    some = [replace(record, generation_prompts=tuple(PROMPTS[:2])) for record in records[:2]]
    references = freely.references_of(records)
    measured = [
        freely.write_texts(m, tokenizer, some, references, max_tokens=24, seed=1).fluency
        for m in (stuck, random_model(config, seed=0))
    ]
    assert measured[0] is not None
    assert measured[1] is not None
    assert measured[0] < 0.6 * measured[1]


def test_bad_input(model: Decoder, tokenizer: Any, records: list[Record]) -> None:
    with pytest.raises(KeditError, match="max_new_tokens=0"):
        freely.answers(model, tokenizer, records, max_new_tokens=0)
