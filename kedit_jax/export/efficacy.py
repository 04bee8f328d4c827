"""What a changed delta costs the facts that the session wrote: how the model answers them with and without the change."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kedit_jax.delta import EditDelta, apply_edits
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import PairScores, PreparedPairs, prepare_pairs, score_pairs


@dataclass(frozen=True)
class Answers:
    """How a model answers the facts.

    Attributes:
        probability: of the target per token (geometric mean), averaged over the facts, 0 to 1.
        exact_match: share of the facts whose every target token is the likeliest, 0 to 1.
    """

    probability: float
    exact_match: float


@dataclass(frozen=True)
class Efficacy:
    """How the facts of a session are answered by the unedited model, with the session's delta, and with another one.

    Attributes:
        facts: how many were scored.
        lost: facts met exactly with the session's delta and missed with the other.
        largest_drop: of a fact's probability.
        unscored: facts whose target cannot be told from the prompt by tokens, such as one behind a prompt that ends in a
            blank; they can be edited all the same.
    """

    facts: int
    unedited: Answers
    full: Answers
    changed: Answers
    lost: tuple[str, ...]
    largest_drop: float
    unscored: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def lines(self, name: str = "adapter") -> list[str]:
        """A report of three models, a line each, and the facts that were lost."""
        rows: Mapping[str, Answers] = {"unedited": self.unedited, "full delta": self.full, name: self.changed}
        told = [f"{self.facts} facts: probability per target token, exact match"]
        told += [
            f"  {label:<10} {100 * row.probability:6.2f} %  {100 * row.exact_match:6.1f} %" for label, row in rows.items()
        ]
        for what, ids in (("lost", self.lost), ("not scored", self.unscored)):
            if ids:
                more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
                line = f"  {what}: {', '.join(ids[:5])}{more}"
                told += textwrap.wrap(line, 80, subsequent_indent="    ", break_on_hyphens=False)
        return told


def efficacy_of(session: EditSession, delta: EditDelta) -> Efficacy:
    """Score the session's facts on its unedited model, its edited one, and the unedited one with `delta`.

    Added to the kernels, the delta is rounded to the model's dtype; an adapter served unmerged beside a 16-bit model is not.

    Raises:
        KeditError: no fact can be scored; all are listed.
        NonFiniteError: naming facts without a finite score.
    """
    facts, prepared = _prepared(session.facts, session.tokenizer)
    models = (session.base, session.model, apply_edits(session.base, delta))
    unedited, full, changed = (score_pairs(model, prepared) for model in models)
    lost = np.flatnonzero(full.correct & ~changed.correct)
    return Efficacy(
        facts=len(facts),
        unedited=_answers(unedited),
        full=_answers(full),
        changed=_answers(changed),
        lost=tuple(str(facts[place].id) for place in lost),
        largest_drop=float(np.max(np.exp(-full.nll) - np.exp(-changed.nll))),
        unscored=tuple(str(fact.id) for fact in session.facts if fact not in facts),
    )


def _prepared(facts: Sequence[EditRequest], tokenizer: Any) -> tuple[list[EditRequest], PreparedPairs]:
    """The facts that can be scored, and their prompts and targets."""
    kept = [fact for fact in facts if _can_be_scored(fact, tokenizer)] or facts
    return list(kept), prepare_pairs([_pair(fact) for fact in kept], tokenizer)


def _can_be_scored(fact: EditRequest, tokenizer: Any) -> bool:
    try:
        prepare_pairs([_pair(fact)], tokenizer)
    except KeditError:
        return False
    return True


def _pair(fact: EditRequest) -> tuple[str, str]:
    return fact.text, fact.target.strip()


def _answers(scores: PairScores) -> Answers:
    return Answers(float(np.exp(-scores.nll).mean()), float(scores.correct.mean()))
