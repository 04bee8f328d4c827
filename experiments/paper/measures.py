"""What is measured of an edited model: quality on records, cost to the rest, and the norms of the updates.

Every measure is a column by name (`COLUMNS`); configs that ask for another are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from experiments.paper.stage import Stage, spread
from kedit_jax.delta import EditDelta, host_kernel
from kedit_jax.editing import EditSession, key_drift
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import (
    Prepared,
    Record,
    answers,
    perplexity,
    prepare,
    prepare_pairs,
    score_pairs,
    score_records,
    score_task,
    write_texts,
)
from kedit_jax.evaluation.metrics import Percentages, RecordMeasures, record_measures, summarize
from kedit_jax.models import Decoder, down_kernel_address


@dataclass(frozen=True)
class Column:
    """What a measure is called in tables and figures, in which unit, and whether more is better."""

    label: str
    unit: str = "%"
    better: str = "more"


COLUMNS: Mapping[str, Column] = {
    "efficacy": Column("efficacy"),
    "generalization": Column("generalization"),
    "specificity": Column("specificity"),
    "score": Column("score S"),
    "efficacy_accuracy": Column("efficacy, exact match"),
    "generalization_accuracy": Column("generalization, exact match"),
    "specificity_accuracy": Column("specificity, exact match"),
    "same_subject_accuracy": Column("other facts of the subject, exact match"),
    "retention": Column("retention of the first edits"),
    "retention_accuracy": Column("retention, exact match"),
    "perplexity": Column("perplexity", "", "less"),
    "untouched_accuracy": Column("facts of unedited subjects, exact match"),
    "type_accuracy": Column("what subjects are, exact match"),
    "step_norm": Column("|update of the step|", "", "less"),
    "update_norm": Column("|sum of updates|", "", "less"),
    "kernel_growth": Column("|kernel| / |original kernel|", "", "less"),
    "distance": Column("distance from the one-time edit", "", "less"),
    "drift": Column("unmet part of the normal equations", "", "less"),
    "key_drift": Column("key drift, mean", "", "less"),
    "key_drift_largest": Column("key drift, largest", "", "less"),
    "reread_change": Column("change of the update by keys read again", "", "less"),
    "reread_efficacy_accuracy": Column("efficacy after reading keys again, exact match"),
    "reread_specificity_accuracy": Column("specificity after reading keys again, exact match"),
    "batch_efficacy_accuracy": Column("efficacy of the last batch, exact match"),
    "holding_accuracy": Column("facts that should hold, exact match"),
    "outdated_accuracy": Column("facts that should no longer hold, exact match", "%", "less"),
    "restored_accuracy": Column("original objects of retracted facts, exact match"),
    "inconsistency": Column("distance from a fresh edit of what should hold", "", "less"),
    "first_residual": Column("unmet part of the first constraints", "%", "less"),
    "all_residual": Column("unmet part of all constraints so far", "%", "less"),
    "shift_subject": Column("shift at the subject's last token", "", "less"),
    "shift_prompt": Column("shift at the prompt's last token", "", "less"),
    "centre_shift_subject": Column("shift of the centre, subject's last token", "", "less"),
    "centre_shift_prompt": Column("shift of the centre, prompt's last token", "", "less"),
    "fluency": Column("fluency", ""),
    "consistency": Column("consistency", ""),
    "generation_efficacy": Column("efficacy, free answer"),
    "generation_generalization": Column("generalization, free answer"),
    "generation_specificity": Column("specificity, free answer"),
    "ability_f1": Column("general ability, weighted F1"),
    "ability_accuracy": Column("general ability, accuracy"),
}


def check_columns(names: Sequence[str]) -> None:
    """Raise a KeditError that names measures there are not."""
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise KeditError(f"unknown metric {', '.join(unknown)}; there are {', '.join(COLUMNS)}")


def freely(stage: Stage, model: Decoder, records: Sequence[Record], count: int) -> dict[str, float | None]:
    """What the model says by itself about `count` of the edited records, evenly spaced: free answers and sampled text."""
    some = spread(records, count)
    if not some:
        return {}
    said = answers(model, stage.tokenizer, some)
    found = {f"generation_{name}": getattr(said, name) for name in ("efficacy", "generalization", "specificity")}
    if stage.references is not None:
        text = write_texts(model, stage.tokenizer, some, stage.references)
        found |= {"fluency": text.fluency, "consistency": text.consistency}
    return found


class Quality:
    """Measures records on models, prepared once for all models that the same records are asked of.

    Args:
        records: all that a run edits, in order.
        first: how many of them make up the retention.
    """

    def __init__(self, stage: Stage, records: Sequence[Record], first: int) -> None:
        self._stage, self._records, self._first = stage, records, first
        self._prepared: dict[tuple[int, int], tuple[Prepared, np.ndarray, int]] = {}

    def __call__(self, model: Decoder, edits: int, sample: int) -> dict[str, float | None]:
        """Measures over at most `sample` of the first `edits` records, evenly spaced, and retention over the first ones.

        Other facts of a subject count only where they are not edited themselves.
        """
        prepared, rows, first = self._of(edits, sample)
        return percentages(model, prepared, rows, first)

    def _of(self, edits: int, sample: int) -> tuple[Prepared, np.ndarray, int]:
        if (edits, sample) not in self._prepared:
            edited = {(record.subject, record.target_true) for record in self._records[:edits]}
            places = spread(range(edits), sample)
            first = min(self._first, edits)
            union = [*range(first), *(place for place in places if place >= first)]
            asked = []
            for number in union:
                record = self._records[number]
                others = tuple(fact for fact in record.same_subject if (record.subject, fact.target) not in edited)
                asked.append(replace(record, same_subject=others))
            rows = np.searchsorted(union, places)
            self._prepared[edits, sample] = prepare(asked, self._stage.tokenizer), rows, first
        return self._prepared[edits, sample]


def percentages(model: Decoder, prepared: Prepared, rows: np.ndarray, first: int) -> dict[str, float | None]:
    """The measures over some of the records, and retention over the first ones."""
    measures = record_measures(score_records(model, prepared))
    whole = summarize(_taken(measures, rows))
    early = summarize(_taken(measures, np.arange(first)), max(first, 1))
    found = {item.name: getattr(whole, item.name) for item in fields(Percentages)}
    return found | {"retention": early.retention, "retention_accuracy": early.retention_accuracy}


def _taken(measures: RecordMeasures, rows: np.ndarray) -> RecordMeasures:
    return RecordMeasures(**{item.name: getattr(measures, item.name)[rows] for item in fields(RecordMeasures)})


def cost(stage: Stage, model: Decoder) -> dict[str, Any]:
    """What editing did to the rest: perplexity, facts that no edit is about, and tasks of general ability."""
    found: dict[str, Any] = {
        name: float(100 * score_pairs(model, pairs).correct.mean()) for name, pairs in stage.untouched.items()
    }
    if stage.tasks:
        scores = {task.task.name: score_task(model, task) for task in stage.tasks}
        found["ability_f1"] = float(np.mean([score.f1 for score in scores.values()]))
        found["ability_accuracy"] = float(np.mean([score.accuracy for score in scores.values()]))
        found["tasks"] = {name: score.f1 for name, score in scores.items()}
    if stage.heldout is not None:
        found["perplexity"] = perplexity(model, stage.heldout)
    return found


class Norms:
    """Frobenius norms over all edited kernels together."""

    def __init__(self, model: Decoder, layers: Sequence[int]) -> None:
        self._kernels = {name: host_kernel(model, name).astype(np.float64) for name in map(down_kernel_address, layers)}
        self._original = _norm(self._kernels.values())

    def __call__(self, step: EditDelta, total: EditDelta) -> dict[str, float]:
        """Of a step, of the sum of all steps, and of the kernels relative to the original ones."""
        sums = {name: np.asarray(total[name].dense()) for name in total.addresses}
        edited = [kernel + sums[name] if name in sums else kernel for name, kernel in self._kernels.items()]
        return {
            "step_norm": _norm(np.asarray(step[name].dense()) for name in step.addresses),
            "update_norm": _norm(sums.values()),
            "kernel_growth": _norm(edited) / self._original,
        }


def _norm(arrays: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))


def unmet(session: EditSession) -> float:
    """|A0 D + K' Omega (K D - R0)| / |K' Omega R0| over all layers, of the constraints that the session claims to meet.

    0 where the session's updates solve what its history says; for `latest-simplified` this is the drift that leaving
    A0 D of the earlier steps out accumulates.
    """
    left, right = [], []
    for layer, held in session.layers.items():
        prior, stack, update = session.editors[layer].prior, held.constraints, held.update
        keys, weights = np.asarray(stack.keys, np.float64), 1 / np.asarray(stack.noise)[:, None]
        basis = None if prior.basis is None else np.asarray(prior.basis)
        factor = np.asarray(prior.factor)
        inside = update if basis is None else basis.T @ update
        weighted = np.square(factor)[:, None] * inside if factor.ndim == 1 else factor @ (factor.T @ inside)
        pulled, wanted = (keys.T @ (weights * rows) for rows in (keys @ update - stack.residuals, stack.residuals))
        left.append(weighted + (pulled if basis is None else basis.T @ pulled))
        right.append(wanted if basis is None else basis.T @ wanted)
    return _norm(left) / _norm(right)


def drifted(session: EditSession) -> dict[str, float]:
    """How far keys have moved since they were recorded, over all edited layers but the first, whose keys never move."""
    upper = [drift for layer, drift in key_drift(session).items() if layer != session.settings.layers[0]]
    if not upper:
        return {"key_drift": 0.0, "key_drift_largest": 0.0}
    relative = np.concatenate([drift.relative for drift in upper])
    return {"key_drift": float(relative.mean()), "key_drift_largest": float(relative.max())}


def accuracy(stage: Stage, model: Decoder, asked: Sequence[tuple[str, str]]) -> float | None:
    """Percent of (prompt, answer) pairs whose answer is met exactly; None for no pairs."""
    if not asked:
        return None
    return float(100 * score_pairs(model, prepare_pairs(list(asked), stage.tokenizer)).correct.mean())
