"""How well a model was edited, and what it cost: records, scores, measures, perplexity, free text."""

from kedit_jax.evaluation.completions import Completion, compare_completions, complete, sample_texts
from kedit_jax.evaluation.counterfact import Prepared, prepare, score_records
from kedit_jax.evaluation.datasets import (
    fetch,
    longest_shared_span,
    parse_records,
    place_subject,
    read_records,
    write_records,
)
from kedit_jax.evaluation.freely import (
    Answer,
    FreeAnswers,
    FreeText,
    References,
    Written,
    answers,
    references_in,
    references_of,
    write_texts,
)
from kedit_jax.evaluation.perplexity import PreparedTexts, perplexity, prepare_texts
from kedit_jax.evaluation.records import Fact, Record, RecordError
from kedit_jax.evaluation.report import UNEDITED, Evaluation, evaluate, table
from kedit_jax.evaluation.scoring import Pair, PairScores, PreparedPairs, prepare_pairs, score_pairs

__all__ = [
    "UNEDITED",
    "Answer",
    "Completion",
    "Evaluation",
    "Fact",
    "FreeAnswers",
    "FreeText",
    "Pair",
    "PairScores",
    "Prepared",
    "PreparedPairs",
    "PreparedTexts",
    "Record",
    "RecordError",
    "References",
    "Written",
    "answers",
    "compare_completions",
    "complete",
    "evaluate",
    "fetch",
    "longest_shared_span",
    "parse_records",
    "perplexity",
    "place_subject",
    "prepare",
    "prepare_pairs",
    "prepare_texts",
    "read_records",
    "references_in",
    "references_of",
    "sample_texts",
    "score_pairs",
    "score_records",
    "table",
    "write_records",
    "write_texts",
]
