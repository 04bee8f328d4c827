"""The measures on hand-made scores with known answers."""

import numpy as np
import pytest

from kedit_jax.errors import KeditError
from kedit_jax.evaluation.metrics import (
    FactScores,
    PromptScores,
    Scores,
    harmonic_mean,
    percentage,
    record_means,
    record_measures,
    summarize,
)


def prompts(*rows: tuple[int, float, float, bool, bool]) -> PromptScores:
    """Rows of (record, NLL(new), NLL(true), new correct, true correct)."""
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 5
    dtypes = (np.int64, np.float64, np.float64, bool, bool)
    return PromptScores(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def facts(*rows: tuple[int, bool]) -> FactScores:
    record, correct = zip(*rows, strict=True) if rows else ([], [])
    return FactScores(np.array(record, np.int64), np.ones(len(rows)), np.array(correct, bool))


@pytest.fixture
def scores() -> Scores:
    return Scores(
        n=3,
        rewrite=prompts((0, 1, 2, True, False), (1, 2, 1, False, True), (2, 1, 1, True, True)),
        paraphrase=prompts((0, 1, 2, True, False), (0, 3, 2, False, False), (1, 1, 2, False, False)),
        neighborhood=prompts(
            (0, 5, 1, False, True), (0, 5, 1, False, False), (0, 5, 1, False, True), (0, 1, 5, True, False),
            (2, 3, 3, False, True),
        ),
        same_subject=facts((1, True), (1, True), (1, False), (2, False)),
    )  # fmt: skip


def test_known_answers(scores: Scores) -> None:
    found = summarize(record_measures(scores))
    assert found.efficacy == pytest.approx(100 / 3)  # records 1, 0 and 0: the tie fails
    assert found.generalization == pytest.approx(75)  # records 1/2 and 1; the third has no paraphrase
    assert found.specificity == pytest.approx(37.5)  # records 3/4 and 0: the tie fails here too
    assert found.score == pytest.approx(3 / (3 / 100 + 1 / 75 + 1 / 37.5))
    assert found.efficacy_accuracy == pytest.approx(200 / 3)
    assert found.generalization_accuracy == pytest.approx(25)
    assert found.specificity_accuracy == pytest.approx(75)  # of the true object: records 1/2 and 1
    assert found.same_subject_accuracy == pytest.approx(100 / 3)  # records 2/3 and 0
    assert (found.retention, found.retention_accuracy) == (found.efficacy, found.efficacy_accuracy)


def test_prompts_that_lack_an_object_take_part_where_it_is_not_needed() -> None:
    """As zsRE's: a rewrite without a true object, a neighbourhood fact without a new one."""
    nan = float("nan")
    lacking = Scores(
        n=3,
        rewrite=prompts((0, 1, nan, True, False), (1, 2, nan, False, False), (2, 1, 2, True, False)),
        paraphrase=prompts((0, 1, nan, True, False), (1, 2, nan, True, False)),
        neighborhood=prompts((0, nan, 2, False, True), (1, nan, 1, False, False), (1, 2, 1, False, True)),
        same_subject=facts(),
    )
    found = summarize(record_measures(lacking))
    assert found.efficacy == 100  # of the third record alone; as failures the others would give 33
    assert found.efficacy_accuracy == pytest.approx(200 / 3)
    assert (found.generalization, found.generalization_accuracy) == (None, 100)
    assert found.specificity == 100  # of the one prompt with both
    assert found.specificity_accuracy == 75
    assert found.score is None


def test_mean_over_prompts_then_over_records(scores: Scores) -> None:
    """Published averages; pooling all prompts would give 60 % here, not 37.5 %."""
    pooled = 100 * scores.neighborhood.prefers_true().mean()
    assert pooled == pytest.approx(60)
    assert summarize(record_measures(scores)).specificity == pytest.approx(37.5)


def test_retention_is_of_the_first_records(scores: Scores) -> None:
    measures = record_measures(scores)
    assert summarize(measures, first=1).retention == 100
    assert summarize(measures, first=2).retention == 50
    assert summarize(measures, first=2).retention_accuracy == 50
    assert summarize(measures, first=1000).retention == pytest.approx(100 / 3)
    with pytest.raises(KeditError, match="first=0"):
        summarize(measures, first=0)


def test_ties_are_failures_both_ways() -> None:
    tied = prompts((0, 1, 1, True, True))
    assert not tied.prefers_new().any()
    assert not tied.prefers_true().any()


def test_swapping_the_objects_gives_the_complement() -> None:
    rng = np.random.default_rng(0)
    record, new, true = np.repeat(np.arange(20), 3), rng.normal(size=60), 0.5 + rng.normal(size=60)
    correct = rng.random(60) < 0.5
    straight, swapped = (
        Scores(n=20, rewrite=made, paraphrase=made, neighborhood=made, same_subject=facts())
        for made in (
            PromptScores(record, new, true, correct, ~correct),
            PromptScores(record, true, new, ~correct, correct),
        )
    )
    a, b = (summarize(record_measures(scores)) for scores in (straight, swapped))
    assert a.efficacy is not None
    assert b.efficacy == pytest.approx(100 - a.efficacy)
    assert b.specificity == pytest.approx(a.efficacy)
    assert a.efficacy != pytest.approx(50)


def test_measures_without_prompts_are_absent() -> None:
    only = Scores(
        n=1, rewrite=prompts((0, 1, 2, True, False)), paraphrase=prompts(), neighborhood=prompts(), same_subject=facts()
    )
    found = summarize(record_measures(only))
    assert found.efficacy == 100
    assert (found.generalization, found.specificity, found.score, found.same_subject_accuracy) == (None,) * 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([100.0, 100.0, 100.0], 100),
        ([50.0, 100.0, 100.0], 75),
        ([0.0, 100.0, 100.0], 0),
        ([0.0, 0.0, 0.0], 0),
        ([None, 1.0, 1.0], None),
        ([], None),
    ],
)
def test_harmonic_mean(values: list[float | None], expected: float | None) -> None:
    assert harmonic_mean(values) == (None if expected is None else pytest.approx(expected))


def test_record_means_and_percentage() -> None:
    means = record_means(np.array([1.0, 0.0, 1.0]), np.array([2, 0, 2]), 4)
    np.testing.assert_array_equal(means, [0, np.nan, 1, np.nan])
    assert percentage(means) == 50
    assert percentage(np.array([np.nan])) is None
