"""What `kedit eval` measures of one model, under names that a person reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from kedit_jax.cli.text import escape
from kedit_jax.evaluation import AbilityScore, Evaluation, FreeAnswers, FreeText

_ALL = "of prompts with every token of the right object the likeliest"

MEASURES: Mapping[str, tuple[str, str]] = {
    "efficacy": ("Efficacy", "% of rewrite prompts with the new object likelier than the true one"),
    "efficacy_accuracy": ("Efficacy, exact", f"% {_ALL}"),
    "generalization": ("Generalization", "the same for paraphrases"),
    "generalization_accuracy": ("Generalization, exact", f"% {_ALL}"),
    "specificity": ("Specificity", "% of prompts about other subjects with their true object likelier than the new one"),
    "specificity_accuracy": ("Specificity, exact", f"% {_ALL}"),
    "score": ("Score", "harmonic mean of efficacy, generalization and specificity"),
    "same_subject_accuracy": ("Same subject, exact", "other facts of the edited subjects"),
    "retention": ("Retention", "efficacy of the first records"),
    "retention_accuracy": ("Retention, exact", f"% {_ALL}"),
    "perplexity": ("Perplexity", "on held-out text; lower is better"),
}
"""Field of an `Evaluation` -> its name, and what it says."""


@dataclass(frozen=True)
class Measured:
    """One model's row: CounterFact's measures, and what else was asked for.

    Attributes:
        free, text: free answers and sampled text; None where not asked for.
        ability: by name of the task.
    """

    evaluation: Evaluation
    free: FreeAnswers | None = None
    text: FreeText | None = None
    ability: Mapping[str, AbilityScore] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; what was not asked for is left out."""
        content: dict[str, Any] = self.evaluation.to_dict()
        if self.free is not None:
            content["free_answers"] = self.free.to_dict()
        if self.text is not None:
            content["free_text"] = self.text.to_dict()
        if self.ability:
            content["ability"] = {name: score.to_dict() for name, score in self.ability.items()}
        return content


def free_table(rows: Mapping[str, Measured]) -> Table:
    """What models say when they are left to speak; narrow enough for 80 columns."""
    made = _table("left to speak", "effi-\ncacy", "general-\nization", "specifi-\ncity", "\nfluency", "consis-\ntency")
    for name, row in rows.items():
        kinds = ("efficacy", "generalization", "specificity")
        free = [_cell(None if row.free is None else getattr(row.free, kind)) for kind in kinds]
        begins = [_cell(None if row.free is None else getattr(row.free, f"{kind}_begins")) for kind in kinds]
        text = [_cell(None if row.text is None else getattr(row.text, key)) for key in ("fluency", "consistency")]
        made.add_row(escape(name), *free, *text)
        if row.free is not None:
            made.add_row("  begins with it", *begins, "", "")
    return made


def ability_table(rows: Mapping[str, Measured]) -> Table:
    """A row a task, and of each model the weighted F1 and the accuracy."""
    made = _table("ability", "\nquestions", *(f"{name}\n{key}" for name in rows for key in ("F1", "accuracy")), "\nguessing")
    first = next(iter(rows.values()))
    for task, score in first.ability.items():
        cells = [_cell(value) for row in rows.values() for value in (row.ability[task].f1, row.ability[task].accuracy)]
        made.add_row(escape(task), str(score.n), *cells, _cell(score.chance))
    return made


def _table(first: str, *heads: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    made.add_column(f"\n{first}", no_wrap=True)
    for heading in heads:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
