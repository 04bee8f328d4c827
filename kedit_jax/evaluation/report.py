"""One model, one row: all measures of a set of records, and tables of such rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from kedit_jax.errors import KeditError
from kedit_jax.evaluation.counterfact import Prepared, score_records
from kedit_jax.evaluation.metrics import Percentages, RecordMeasures, Scores, record_measures, summarize
from kedit_jax.evaluation.perplexity import PreparedTexts, perplexity
from kedit_jax.models import Decoder

UNEDITED = "unedited"
"""Name of the row that every table begins with."""


@dataclass(frozen=True)
class Details:
    """What an evaluation was summed up from.

    Attributes:
        case_ids: of the records, in order of editing.
        measures: each measure of each record.
        scores: the scores of each prompt.
    """

    case_ids: tuple[int | str, ...]
    measures: RecordMeasures
    scores: Scores

    def rows(self) -> list[dict[str, Any]]:
        """One plain object a record: its case id and its measures, 0 to 1, None where it has no prompts of the kind."""
        columns = {item.name: getattr(self.measures, item.name).tolist() for item in fields(self.measures)}
        return [
            {"case_id": case_id} | {name: None if math.isnan(column[i]) else column[i] for name, column in columns.items()}
            for i, case_id in enumerate(self.case_ids)
        ]


@dataclass(frozen=True)
class Evaluation(Percentages):
    """The measures of one model on n records (see `Percentages`).

    Attributes:
        perplexity: on held-out text; None where none was given.
        n: number of records.
        details: measures of each record, scores of each prompt.
    """

    perplexity: float | None
    n: int
    details: Details = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, float | int | None]:
        """The numbers alone, ready for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "details"}


def evaluate(model: Decoder, prepared: Prepared, *, heldout: PreparedTexts | None = None, first: int = 100) -> Evaluation:
    """All measures of a model on prepared records. Evaluate the unedited model too: a percentage means little alone.

    Args:
        model: unedited or edited; models of one structure share their compiled programs.
        prepared: the records, in order of editing.
        heldout: texts for the perplexity.
        first: how many of the earliest edits make up the retention.

    Raises:
        KeditError: `first` is below 1, or the records or texts do not fit the model.
        NonFiniteError: naming prompts or texts without a finite score.
    """
    scores = score_records(model, prepared)
    measures = record_measures(scores)
    percentages = summarize(measures, first)
    return Evaluation(
        **{item.name: getattr(percentages, item.name) for item in fields(percentages)},
        perplexity=None if heldout is None else perplexity(model, heldout),
        n=scores.n,
        details=Details(tuple(record.case_id for record in prepared.records), measures, scores),
    )


COLUMNS = {
    "effi-\ncacy": ("efficacy", "efficacy_accuracy"),
    "general-\nization": ("generalization", "generalization_accuracy"),
    "specifi-\ncity": ("specificity", "specificity_accuracy"),
    "\nscore": ("score", None),
    "same\nsubject": (None, "same_subject_accuracy"),
    "reten-\ntion": ("retention", "retention_accuracy"),
    "perplex-\nity": ("perplexity", None),
}
"""Headings, and under each what the two lines of a model show: by probability, and as exact match of the whole answer."""


def table(rows: Mapping[str, Evaluation], *, title: str | None = None) -> Table:
    """A rich table of evaluations, narrow enough for 80 columns, the unedited model's first.

    A model has two lines: the measures by probability, and below them the share of answers met exactly.

    Raises:
        KeditError: no row is named "unedited".
    """
    if UNEDITED not in rows:
        raise KeditError(f"the rows {list(rows)} lack {UNEDITED!r}; evaluate the unedited model too and name it so")
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    made.add_column("\nmodel", no_wrap=True)
    for heading in COLUMNS:
        made.add_column(heading, justify="right", no_wrap=True)
    for name in [UNEDITED, *(name for name in rows if name != UNEDITED)]:
        cells = [["" if key is None else _cell(getattr(rows[name], key)) for key in keys] for keys in COLUMNS.values()]
        for line, label in enumerate((escape(name), "  exact match")):
            made.add_row(label, *(cell[line] for cell in cells))
    return made


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
