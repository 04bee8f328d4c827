"""From scores to measures: CounterFact's (Meng et al. 2022), plain NumPy.

Averages follow the published evaluation (`experiments/summarize.py` of the ROME and MEMIT code): a measure is averaged over
the prompts of a record first and over the records after that, so a record with ten neighbourhood prompts weighs as much
as one with two. A record without prompts of a kind does not take part in that kind's measures, and a prompt without one of
its objects in none that needs that object: sets that name no true object, such as zsRE, are measured by exact match.
Percentages are 0 to 100.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from kedit_jax.errors import KeditError


@dataclass(frozen=True)
class PromptScores:
    """Scores of n prompts of one kind with both objects.

    Attributes:
        record: position of the record that each prompt measures.
        nll_new, nll_true: mean negative log-likelihood per token of the new and of the true object; NaN where a prompt has
            no such object (scores that should be there are finite, see `score_pairs`).
        correct_new, correct_true: whether every token of that object is the argmax.
    """

    record: Int[np.ndarray, "n"]
    nll_new: Float[np.ndarray, "n"]
    nll_true: Float[np.ndarray, "n"]
    correct_new: Bool[np.ndarray, "n"]
    correct_true: Bool[np.ndarray, "n"]

    def prefers_new(self) -> Bool[np.ndarray, "n"]:
        """NLL(new) < NLL(true); a tie is a failure."""
        return self.nll_new < self.nll_true

    def prefers_true(self) -> Bool[np.ndarray, "n"]:
        """NLL(true) < NLL(new); a tie is a failure."""
        return self.nll_true < self.nll_new

    def means(self, values: Bool[np.ndarray, "n"], n: int, needs: str = "new true") -> Float[np.ndarray, "r"]:
        """Means of values over the prompts of each of n records, without prompts that lack an object that they need."""
        lacking = np.zeros(len(values), bool)
        for name in needs.split():
            lacking |= np.isnan(getattr(self, f"nll_{name}"))
        return record_means(values[~lacking], self.record[~lacking], n)


@dataclass(frozen=True)
class FactScores:
    """Scores of n other facts, each with its own object.

    Attributes:
        record: position of the record whose subject the fact is about.
        nll: mean negative log-likelihood per token of the object.
        correct: whether every token of the object is the argmax.
    """

    record: Int[np.ndarray, "n"]
    nll: Float[np.ndarray, "n"]
    correct: Bool[np.ndarray, "n"]


@dataclass(frozen=True)
class Scores:
    """All scores of n records."""

    n: int
    rewrite: PromptScores
    paraphrase: PromptScores
    neighborhood: PromptScores
    same_subject: FactScores


@dataclass(frozen=True)
class RecordMeasures:
    """Each measure of each of n records: a share of the record's prompts, 0 to 1, NaN where it has none."""

    efficacy: Float[np.ndarray, "n"]
    generalization: Float[np.ndarray, "n"]
    specificity: Float[np.ndarray, "n"]
    efficacy_accuracy: Float[np.ndarray, "n"]
    generalization_accuracy: Float[np.ndarray, "n"]
    specificity_accuracy: Float[np.ndarray, "n"]
    same_subject_accuracy: Float[np.ndarray, "n"]


@dataclass(frozen=True)
class Percentages:
    """The measures over all records, 0 to 100; None where no record has prompts of the kind.

    Attributes:
        efficacy: share of rewrite prompts with NLL(new) < NLL(true).
        generalization: the same for paraphrase prompts.
        specificity: share of neighbourhood prompts with NLL(true) < NLL(new).
        score: S, the harmonic mean of these three; 0 if one of them is 0.
        efficacy_accuracy, generalization_accuracy: share of prompts on which every token of the new object is the argmax.
        specificity_accuracy: the same for the true object on neighbourhood prompts, and for a neighbourhood fact's own.
        same_subject_accuracy: the same for other facts of the subject and their own objects.
        retention, retention_accuracy: efficacy and its accuracy over the first records alone, in order of editing.
    """

    efficacy: float | None
    generalization: float | None
    specificity: float | None
    score: float | None
    efficacy_accuracy: float | None
    generalization_accuracy: float | None
    specificity_accuracy: float | None
    same_subject_accuracy: float | None
    retention: float | None
    retention_accuracy: float | None


def record_means(
    values: Bool[np.ndarray, "p"] | Float[np.ndarray, "p"], record: Int[np.ndarray, "p"], n: int
) -> Float[np.ndarray, "n"]:
    """Mean of the values of each of n records; NaN for a record that has none."""
    counts = np.bincount(record, minlength=n)
    sums = np.bincount(record, weights=values, minlength=n)
    return np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)


def percentage(per_record: Float[np.ndarray, "n"]) -> float | None:
    """100 times the mean over the records that have a value; None if none has."""
    present = per_record[~np.isnan(per_record)]
    return float(100 * present.mean()) if present.size else None


def harmonic_mean(percentages: Sequence[float | None]) -> float | None:
    """Harmonic mean; 0 if one of them is 0, None if one of them is."""
    known = [value for value in percentages if value is not None]
    if not known or len(known) < len(percentages):
        return None
    return 0.0 if min(known) == 0 else len(known) / sum(1 / value for value in known)


def record_measures(scores: Scores) -> RecordMeasures:
    """Each measure of each record."""
    rewrite, paraphrase, neighborhood = scores.rewrite, scores.paraphrase, scores.neighborhood
    return RecordMeasures(
        efficacy=rewrite.means(rewrite.prefers_new(), scores.n),
        generalization=paraphrase.means(paraphrase.prefers_new(), scores.n),
        specificity=neighborhood.means(neighborhood.prefers_true(), scores.n),
        efficacy_accuracy=rewrite.means(rewrite.correct_new, scores.n, "new"),
        generalization_accuracy=paraphrase.means(paraphrase.correct_new, scores.n, "new"),
        specificity_accuracy=neighborhood.means(neighborhood.correct_true, scores.n, "true"),
        same_subject_accuracy=record_means(scores.same_subject.correct, scores.same_subject.record, scores.n),
    )


def summarize(measures: RecordMeasures, first: int = 100) -> Percentages:
    """The measures over all records, and retention over the `first` of them (all, where there are fewer).

    Raises:
        KeditError: `first` is below 1.
    """
    if first < 1:
        raise KeditError(f"first={first}: retention needs at least one of the earliest edits; give 1 or more")
    shares = {field.name: percentage(getattr(measures, field.name)) for field in fields(measures)}
    return Percentages(
        **shares,
        score=harmonic_mean([shares["efficacy"], shares["generalization"], shares["specificity"]]),
        retention=percentage(measures.efficacy[:first]),
        retention_accuracy=percentage(measures.efficacy_accuracy[:first]),
    )
