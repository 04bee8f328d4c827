"""What CounterFact asks of a model about each record: which prompts, with which objects."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from kedit_jax.evaluation.metrics import FactScores, PromptScores, Scores
from kedit_jax.evaluation.packing import BATCH_TOKENS
from kedit_jax.evaluation.records import Record, RecordError
from kedit_jax.evaluation.scoring import Pair, PairScores, PreparedPairs, prepare_pairs, score_pairs
from kedit_jax.models import Decoder


@dataclass(frozen=True)
class PromptIndex:
    """Where the scores of one kind of prompt stand among the pairs.

    Attributes:
        record: position of the record that each prompt measures.
        new, true: the pairs of the prompt with the new and with the true object; -1 where the prompt has no such object.
    """

    record: Int[np.ndarray, "n"]
    new: Int[np.ndarray, "n"]
    true: Int[np.ndarray, "n"]

    def take(self, scores: PairScores) -> PromptScores:
        """The scores of these prompts."""
        return PromptScores(
            record=self.record,
            nll_new=np.where(self.new < 0, np.nan, scores.nll[self.new]),
            nll_true=np.where(self.true < 0, np.nan, scores.nll[self.true]),
            correct_new=(self.new >= 0) & scores.correct[self.new],
            correct_true=(self.true >= 0) & scores.correct[self.true],
        )


@dataclass(frozen=True)
class FactIndex:
    """Where the scores of the subjects' other facts stand among the pairs."""

    record: Int[np.ndarray, "n"]
    pair: Int[np.ndarray, "n"]

    def take(self, scores: PairScores) -> FactScores:
        """The scores of these facts."""
        return FactScores(record=self.record, nll=scores.nll[self.pair], correct=scores.correct[self.pair])


@dataclass(frozen=True)
class Prepared:
    """A set of records, tokenised once, to be scored on the unedited model and on any number of edited ones."""

    records: tuple[Record, ...]
    pairs: PreparedPairs
    rewrite: PromptIndex
    paraphrase: PromptIndex
    neighborhood: PromptIndex
    same_subject: FactIndex


def prepare(records: Sequence[Record], tokenizer: Any, *, batch_tokens: int = BATCH_TOKENS) -> Prepared:
    """Tokenise the prompts of the records, in order of editing, with both objects each, as far as there are both.

    A neighbourhood fact has no object but its own.

    Args:
        records: at least one.
        tokenizer: fast tokenizer of the models that will be scored.
        batch_tokens: of a forward pass.

    Raises:
        RecordError: there are no records.
        KeditError: listing every prompt whose target cannot be told from it by tokens.
    """
    if not records:
        raise RecordError("there are no records to evaluate; give at least one")
    number: dict[Pair, int] = {}

    def pair(prompt: str, target: str) -> int:
        return number.setdefault(Pair(prompt, target), len(number))

    def prompts(of: Iterable[tuple[int, str, str | None, str | None]]) -> PromptIndex:
        rows = [(i, *(-1 if target is None else pair(prompt, target) for target in targets)) for i, prompt, *targets in of]
        record, new, true = np.array(rows, np.int64).reshape(-1, 3).T
        return PromptIndex(record, new, true)

    def both(record: Record) -> tuple[str, str | None]:
        return record.target_new, record.target_true

    numbered = list(enumerate(records))
    rewrite = prompts((i, record.rewrite_prompt, *both(record)) for i, record in numbered)
    paraphrase = prompts((i, prompt, *both(record)) for i, record in numbered for prompt in record.paraphrase_prompts)
    neighbors: list[tuple[int, str, str | None, str | None]] = [
        (i, prompt, *both(record)) for i, record in numbered for prompt in record.neighborhood_prompts
    ]
    neighbors += [(i, fact.prompt, None, fact.target) for i, record in numbered for fact in record.neighborhood_facts]
    neighborhood = prompts(neighbors)
    facts = [(i, pair(fact.prompt, fact.target)) for i, record in numbered for fact in record.same_subject]
    same_subject = FactIndex(*np.array(facts, np.int64).reshape(-1, 2).T)
    pairs = prepare_pairs(list(number), tokenizer, batch_tokens=batch_tokens)
    return Prepared(tuple(records), pairs, rewrite, paraphrase, neighborhood, same_subject)


def score_records(model: Decoder, prepared: Prepared) -> Scores:
    """Score all prompts of the records on a model (errors: see `score_pairs`)."""
    scores = score_pairs(model, prepared.pairs)
    return Scores(
        n=len(prepared.records),
        rewrite=prepared.rewrite.take(scores),
        paraphrase=prepared.paraphrase.take(scores),
        neighborhood=prepared.neighborhood.take(scores),
        same_subject=prepared.same_subject.take(scores),
    )
